"""Whatever is done to the bytes of a checkpoint: it loads to something that trains, or it is refused as RegrowError.

REGROW_FUZZ_EXAMPLES says how many changes each test tries, new ones every time; without it they are few and the same.
"""

import contextlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, get_linear_schedule_with_warmup
from transformers.utils import logging

from regrow import RegrowError, TopologyUpdater, UpdateSchedule
from regrow.bert.model import build_model
from regrow.bert.sizes import bert_config
from regrow.nn import named_sparse_layers
from regrow.optim import AdamW
from regrow.training import SafeTrainer
from regrow.training.checkpoint import load_random_state, load_tensors, load_training_state
from regrow.training.manifest import damage
from training.checkpoints import STEPS, STOP, Regression, train, trainer

WISHED = int(os.environ.get("REGROW_FUZZ_EXAMPLES", "0"))
FILES = ("model.safetensors", "training_state.safetensors", "topology_state.safetensors")
DOCUMENTS = ("training_state.json", "trainer_state.json", "manifest.json")
DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F4", "C64", "U64", "XX")
CHANGES = ("number", "number", "number", "dtype", "shape", "offsets", "swap", "rename", "drop", "flip", "cut")
NUMBERS = (0, 1, -1, 3, 7, 8, 2**31 - 1, -(2**31), 2**62, -(2**63), 1e30, float("inf"), float("nan"))
LEAVES = (None, True, False, *NUMBERS, 10**400, "", "8", "\0", [], {}, [1], [[]], {"a": 1}, "checkpoint-8")


def examples(usual: int) -> settings:
    return settings(
        max_examples=WISHED or usual,
        derandomize=not WISHED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *([Phase.shrink] if WISHED else [])],
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder / f"checkpoint-{STOP}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(bert_config("1/64", vocab_size=60, max_length=16), density=0.4, block_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def keep_random_states() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    logging.set_verbosity_error()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@contextlib.contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def transformers_own_refusal() -> Iterator[None]:
    """Dense tensors of another shape: whoever wants them may ask for it by this name."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise


def load(folder: Path, arguments: Any) -> None:
    """What resuming reads, in its order, and then the steps to the next update: nothing that is accepted may fail."""
    model = Regression()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    damage(folder)  # says what is wrong; here it is looked at all the same
    SafeTrainer._load_from_checkpoint(SimpleNamespace(model=model, args=arguments), str(folder))
    load_training_state(folder, optimizer, scheduler)
    updater = TopologyUpdater(model, optimizer, schedule=UpdateSchedule(STEPS, 6), seed=3)
    updater.load_state_dict(load_tensors(folder / "topology_state.safetensors"))
    load_random_state(folder)
    for _ in range(2):
        for _, layer in named_sparse_layers(model):
            layer.topology.validate()
        model(torch.randn(4, 32), torch.zeros(4, 32))["loss"].backward()
        optimizer.step()
        scheduler.step()
        updater.step()
        optimizer.zero_grad()
    np.random.standard_normal(3)
    random.gauss(0, 1)
    assert 0 < updater.coverage <= 1


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_number(entry: dict[str, Any], data: bytes, draw: Any) -> bytes:
    """One number of a tensor replaced."""
    numpy_type = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1", "BOOL": "u1"}[entry["dtype"]]
    start, end = entry["data_offsets"]
    numbers = np.frombuffer(data[start:end], numpy_type).copy()
    value = draw(st.sampled_from(NUMBERS))
    with np.errstate(all="ignore"):
        limits = None if numpy_type == "<f4" else np.iinfo(numpy_type)
        if limits is not None:
            value = int(min(max(value, limits.min), limits.max)) if value == value else 0
        numbers[draw(st.integers(0, len(numbers) - 1))] = value
    return data[:start] + numbers.tobytes() + data[end:]


def changed_tensors(raw: bytes, draw: Any) -> bytes:
    header, data = parts(raw)
    names = sorted(name for name in header if name != "__metadata__")
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    entry = header[name]
    match draw(st.sampled_from(CHANGES)):
        case "number":
            data = with_number(entry, data, draw)
        case "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
            size = {"F16": 2, "BF16": 2, "I16": 2, "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4}
            length = entry["data_offsets"][1] - entry["data_offsets"][0]
            if draw(st.booleans()):
                entry["shape"] = [length // size.get(entry["dtype"], 1)]
        case "shape":
            flat = int(np.prod(entry["shape"]))
            shapes = [[flat], [1, flat], [flat, 1], [flat, 0], [2**62, 4], [-1], [], ["4"]]
            entry["shape"] = draw(st.sampled_from(shapes))
        case "offsets":
            entry["data_offsets"] = header[other]["data_offsets"]
        case "swap":
            header[name], header[other] = header[other], header[name]
        case "rename":
            header[draw(st.sampled_from(["more", name + "x", "optimizer.x.step", "optimizer.99.step", ""]))] = entry
            del header[name]
        case "drop":
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            start = entry["data_offsets"][0]
            data = data[:start] + data[start + size :]
            for rest in header.values():
                if rest is not entry and "data_offsets" in rest and rest["data_offsets"][0] > start:
                    rest["data_offsets"] = [at - size for at in rest["data_offsets"]]
            del header[name]
        case "flip":
            return flipped(raw, draw)
        case "cut":
            return raw[: draw(st.integers(0, len(raw)))]
    return joined(header, data)


def flipped(raw: bytes, draw: Any) -> bytes:
    """Some bits, near the beginning as often as anywhere."""
    content = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(raw) - 1) | st.integers(0, min(len(raw), 400) - 1))
        content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def leaves(document: Any, path: tuple = ()) -> list[tuple]:
    children = document.items() if isinstance(document, dict) else enumerate(document)
    found = [] if not path else [path]
    for key, child in children:
        found += leaves(child, (*path, key)) if isinstance(child, dict | list) else [(*path, key)]
    return found


def changed_document(raw: bytes, draw: Any, under: tuple = ()) -> bytes:
    document = json.loads(raw)
    within = document
    for part in under:
        within = within[part]
    *way, last = draw(st.sampled_from([path for path in leaves(within) if path != ("quant_method",)]))
    for part in way:
        within = within[part]
    match draw(st.sampled_from(["value"] * 4 + ["drop", "more", "flip"])):
        case "value":
            within[last] = draw(st.sampled_from(LEAVES))
        case "drop":
            del within[last]
        case "more" if isinstance(within, dict):
            within[draw(st.sampled_from(["more", "0", ""]))] = draw(st.sampled_from(LEAVES))
        case "flip" if not under:
            return flipped(raw, draw)
    return json.dumps(document).encode()


@examples(100)
@given(data=st.data())
def test_tensors_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    path, arguments = checkpoint / data.draw(st.sampled_from(FILES)), arguments_of(checkpoint)
    content = changed_tensors(path.read_bytes(), data.draw)
    with holding(path, content), contextlib.suppress(RegrowError):
        load(checkpoint, arguments)


@examples(100)
@given(data=st.data())
def test_documents_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    path, arguments = checkpoint / data.draw(st.sampled_from(DOCUMENTS)), arguments_of(checkpoint)
    content = changed_document(path.read_bytes(), data.draw)
    with holding(path, content), contextlib.suppress(RegrowError):
        load(checkpoint, arguments)


@examples(30)
@given(data=st.data())
def test_saved_models(saved: Path, data: st.DataObject) -> None:
    """The tensors, and the layout that regrow reads. The rest of config.json is transformers' own."""
    path = saved / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    if path.suffix == ".json":
        content = changed_document(path.read_bytes(), data.draw, under=("quantization_config",))
    else:
        content = changed_tensors(path.read_bytes(), data.draw)
    with holding(path, content), contextlib.suppress(RegrowError), transformers_own_refusal():
        model = AutoModelForMaskedLM.from_pretrained(saved)
        for _, layer in named_sparse_layers(model):
            layer.topology.validate()
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_an_unchanged_checkpoint_loads(checkpoint: Path) -> None:
    load(checkpoint, arguments_of(checkpoint))


_ARGUMENTS: dict[Path, Any] = {}


def arguments_of(checkpoint: Path) -> Any:
    """Made once: they take longer than everything else here."""
    if checkpoint not in _ARGUMENTS:
        _ARGUMENTS[checkpoint] = trainer(checkpoint.parent).args
    return _ARGUMENTS[checkpoint]
