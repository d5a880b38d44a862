"""Whoever rewrites a checkpoint can rewrite its checksums: it is refused all the same, by the name of what is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, TrainerCallback

from regrow.bert.model import build_model
from regrow.bert.sizes import bert_config
from regrow.errors import RegrowError
from regrow.methods import create
from regrow.nn import mask_linears
from regrow.training import UpdateSchedule
from regrow.training.manifest import damage, write_manifest
from regrow.training.masked import MaskedTraining
from training.checkpoints import STOP, changed, resume, train, trainer

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder / f"checkpoint-{STOP}"


def put(name: str, index: int | tuple, value: float) -> Change:
    """One number of a tensor."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name][index] = value

    return change


def become(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A whole tensor."""
    return lambda tensors: tensors.update({name: make(tensors[name])})


def swap(one: str, other: str) -> Change:
    return lambda tensors: tensors.update({one: tensors[other], other: tensors[one]})


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def at(*path: str | int, value: Any) -> Change:
    """One leaf of a JSON document."""

    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


def duplicate_block(tensors: dict[str, Any]) -> None:
    row_ptr, col_idx = tensors["body.0.topology.row_ptr"], tensors["body.0.topology.col_idx"]
    first = int(row_ptr[:-1][row_ptr.diff() > 1][0])  # of a row with two blocks
    col_idx[first + 1] = col_idx[first]


def test_an_untouched_copy_goes_on_to_bitwise_the_same_end(checkpoint: Path, tmp_path: Path) -> None:
    resume(changed(checkpoint, tmp_path, "training_state.json", lambda document: None))
    for name in ("model.safetensors", "training_state.safetensors", "topology_state.safetensors"):
        ours, theirs = (load_file(run / "checkpoint-12" / name) for run in (tmp_path, checkpoint.parent))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


class Explode(TrainerCallback):
    """The gradient of step 9 is infinite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP:
            kwargs["model"].body[0].bias.register_hook(lambda gradient: gradient + torch.inf)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_checkpoint_that_is_there_is_not_deleted_to_be_written_again(
    resumed: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in between would leave none."""
    copy = changed(checkpoint, tmp_path, "training_state.json", lambda document: None) if resumed else None
    stopped, written = trainer(tmp_path), []
    stopped.add_callback(Explode())
    write = stopped._write_checkpoint
    monkeypatch.setattr(
        stopped, "_write_checkpoint", lambda *states: (written.append(stopped.state.global_step), write(*states))
    )
    with pytest.raises(RegrowError, match="is not finite in step 9; the state before it is saved"):
        stopped.train(resume_from_checkpoint=copy and str(copy))
    assert written == ([] if resumed else [STOP])


TOPOLOGY = "body.0.topology."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(TOPOLOGY + "col_idx", 0, 4), r"body\.0\.topology\.col_idx must lie in \[0, 4\)"),
        (put(TOPOLOGY + "col_idx", 0, -1), r"body\.0\.topology\.col_idx must lie in"),
        (duplicate_block, r"body\.0\.topology\.col_idx must ascend strictly"),
        (put(TOPOLOGY + "row_ptr", 1, 13), r"body\.0\.topology\.row_ptr must rise"),
        (put(TOPOLOGY + "row_ptr", -1, 2**30), r"body\.0\.topology\.row_ptr must rise"),
        (put(TOPOLOGY + "slot", 0, -1), r"body\.0\.topology\.slot must lie in"),
        (swap(TOPOLOGY + "slot", TOPOLOGY + "col_idx"), r"body\.0\.topology\."),
        (swap(TOPOLOGY + "row_ptr", "body.2.topology.row_ptr"), r"size mismatch for body\.\d\.topology\.row_ptr"),
        (become(TOPOLOGY + "slot", torch.Tensor.long), r"body\.0\.topology\.slot must be I32, not I64"),
        (become(TOPOLOGY + "slot", torch.Tensor.float), r"body\.0\.topology\.slot must be I32, not F32"),
        (become("body.0.values", torch.Tensor.double), r"body\.0\.values must be F32, not F64"),
        (become("body.0.values", torch.Tensor.half), r"body\.0\.values must be F32, not F16"),
        (become("body.0.bias", torch.Tensor.int), r"body\.0\.bias must be F32, not I32"),
        (become("body.0.values", lambda t: t[:-1]), r"size mismatch for body\.0\.values"),
        (become("body.0.values", lambda t: t.view(13, 4, 16)), r"size mismatch for body\.0\.values"),
        (
            lambda t: t.update({"body.0.values": t["body.0.values"][:0], TOPOLOGY + "slot": t[TOPOLOGY + "slot"][:0]}),
            r"body\.0\.topology: n_blocks must lie between 1 and 32",
        ),
        (drop("body.2.bias"), r"body\.2\.bias"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r'"more"'),
    ],
)
def test_weights(change: Change, message: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, "model.safetensors", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (become("optimizer.0.exp_avg", torch.Tensor.double), r"optimizer\.0\.exp_avg must be float32 .*, not float64"),
        (become("optimizer.0.exp_avg", torch.Tensor.int), r"optimizer\.0\.exp_avg must be float32 .*, not int32"),
        (become("optimizer.0.exp_avg", lambda t: t[:, :4]), r"optimizer\.0\.exp_avg must be .* not .* \[13, 4, 8\]"),
        (become("optimizer.0.exp_avg_sq", lambda t: t[:, 0, 0]), r"optimizer\.0\.exp_avg_sq must be .* \[13\]"),
        (become("optimizer.0.exp_avg", lambda t: t[0, 0, 0]), r"optimizer\.0\.exp_avg must be .* \[\]"),
        (become("optimizer.0.block_step", lambda t: t[0]), r"optimizer\.0\.block_step must be .* \[13\], not"),
        (swap("optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"), r"optimizer\.0\.exp_avg_sq holds a negative number"),
        (swap("optimizer.0.exp_avg", "optimizer.1.exp_avg"), r"optimizer\.0\.exp_avg must be"),
        (put("optimizer.1.exp_avg", 0, torch.nan), r"optimizer\.1\.exp_avg holds NaN"),
        (put("optimizer.0.step", (), torch.nan), r"optimizer\.0\.step holds NaN"),
        (put("optimizer.0.step", (), -1), r"optimizer\.0\.step must lie between 0 and 8"),
        (put("optimizer.0.step", (), 1e9), r"optimizer\.0\.step must lie between 0 and 8"),
        (put("optimizer.0.block_step", 3, 9), r"optimizer\.0\.block_step must lie between 0 and 8"),
        (drop("optimizer.2.exp_avg"), r"optimizer\.2\.exp_avg is missing"),
        (lambda t: t.update({"optimizer.1.block_step": torch.ones(64)}), r"optimizer\.1\.block_step is unknown"),
        (lambda t: t.update({"optimizer.0.magic": torch.ones(13)}), r"optimizer\.0\.magic is unknown"),
        (lambda t: t.update({"optimizer.4.step": torch.ones(())}), r"optimizer\.4\.step fits no parameter"),
        (lambda t: t.update({"optimizer.00.step": torch.ones(())}), r"optimizer\.00\.step fits no parameter"),
        (lambda t: t.update({"optimizer.x.step": torch.ones(())}), r"optimizer\.x\.step fits no parameter"),
    ],
)
def test_the_state_of_the_optimizer(change: Change, message: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, "training_state.safetensors", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("random.torch"), r"random\.torch is missing"),
        (drop("random.numpy"), r"random\.numpy is missing"),
        (drop("random.python"), r"random\.python is missing"),
        (become("random.torch", lambda t: t[:-1]), r"random\.torch must be uint8"),
        (become("random.torch", torch.Tensor.int), r"random\.torch must be uint8"),
        (become("random.torch", torch.zeros_like), r"random\.torch: "),
        (become("random.numpy", lambda t: t[:-1]), r"random\.numpy must be int64 \[625\], not int64 \[624\]"),
        (become("random.numpy", torch.Tensor.double), r"random\.numpy must be int64 \[625\], not float64"),
        (put("random.numpy", -1, 10**6), r"random\.numpy is at no position"),
        (put("random.numpy", -1, -1), r"random\.numpy is at no position"),
        (put("random.numpy", 5, 2**40), r"random\.numpy holds words that no generator has"),
        (become("random.numpy", torch.zeros_like), r"random\.numpy holds words that no generator has"),
        (put("random.python", 0, 7), r"random\.python is at no position"),
        (put("random.python", -1, 625), r"random\.python is at no position"),
        (put("random.python", 1, -1), r"random\.python holds words that no generator has"),
    ],
)
def test_random_states(change: Change, message: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, "training_state.safetensors", change, message)


def test_more_processes_than_left_their_random_state(checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, "training_state.json", at("ranks", value=10**9))
    with pytest.raises(RegrowError, match=r"is damaged \(random\.999999999\.torch is missing"):
        resume(copy)


GROUP = ("param_groups", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("param_groups"), "its parameter groups are not this run's"),
        (at("param_groups", value=[1]), "its parameter groups are not this run's"),
        (at(*GROUP, "params", value=[0, 1, 2]), "its parameter groups are not this run's"),
        (at(*GROUP, "lr", value="fast"), r"lr of parameter group 0 is 'fast'"),
        (at(*GROUP, "lr", value=float("nan")), r"lr of parameter group 0 is nan"),
        (at(*GROUP, "lr", value=-1.0), r"lr of parameter group 0 is -1\.0"),
        (at(*GROUP, "lr", value=1.0), r"lr is not what the schedule gives at step 8"),
        (at(*GROUP, "betas", value=[0.9, 5.0]), r"betas of parameter group 0 is \[0\.9, 5\.0\], not this run's"),
        (at(*GROUP, "weight_decay", value=None), r"weight_decay of parameter group 0 is None"),
        (at(*GROUP, "fused", value=1), r"fused of parameter group 0 is 1, not this run's True"),
        (at(*GROUP, "more", value=1), r"'more' of parameter group 0 is missing or unknown"),
        (lambda document: document["param_groups"][0].pop("eps"), r"'eps' of parameter group 0 is missing or unknown"),
        (drop("scheduler"), "scheduler has other entries"),
        (at("scheduler", value=[]), "scheduler has other entries"),
        (at("scheduler", "optimizer", value=0), "scheduler has other entries"),
        (at("scheduler", "last_epoch", value="8"), r"scheduler\.last_epoch is '8'"),
        (at("scheduler", "last_epoch", value=-8), r"scheduler\.last_epoch is -8"),
        (at("scheduler", "last_epoch", value=10**30), r"scheduler\.last_epoch is a huge number"),
        (at("scheduler", "last_epoch", value=7), r"lr is not what the schedule gives at step 7"),
        (at("scheduler", "base_lrs", value=[7.0]), r"scheduler\.base_lrs is \[7\.0\], not this run's"),
        (at("scheduler", "base_lrs", value=[]), r"scheduler\.base_lrs is \[\]"),
        (at("scheduler", "_last_lr", value=[None]), r"scheduler\._last_lr is \[None\]"),
        (at("scheduler", "_step_count", value={}), r"scheduler\._step_count is \{\}"),
        (at("optimizer_numbers", value=3), "optimizer_numbers is missing or no JSON object"),
        (at("optimizer_numbers", "optimizer.0.step", value=[]), r"optimizer\.0\.step is \[\]"),
        (drop("extra"), "extra is missing or no JSON object"),
        (at("ranks", value="two"), "ranks is no number of processes"),
        (at("ranks", value=0), "ranks is no number of processes"),
    ],
)
def test_what_is_json(change: Change, message: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, "training_state.json", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("counters", 0, 9), "is of step 9, not of this one"),
        (put("counters", 0, -(2**63)), "counters are -9223372036854775808 steps"),
        (put("counters", 1, 9), "counters are 8 steps with the last update at 9"),
        (become("counters", torch.Tensor.double), r"'counters' must be torch.int64 \[2\]"),
        (become("counters", lambda t: t[:1]), r"'counters' must be torch.int64 \[2\]"),
        (put("body.0.allocated_at", 0, -1), r"body\.0: allocated_at must lie between 0 and 8"),
        (put("body.0.allocated_at", 0, 2**30), r"body\.0: allocated_at must lie between 0 and 8"),
        (put("body.0.start_blocks", (), 0), r"body\.0: start_blocks must lie between 1 and 32, got 0"),
        (put("body.0.start_blocks", (), 2**60), r"body\.0: start_blocks must lie between"),
        (become("body.0.explored", torch.zeros_like), r"body\.0: explored lacks positions that hold a block"),
        (become("body.0.explored", torch.Tensor.int), r"'body\.0\.explored' must be torch.uint8"),
        (swap("body.0.allocated_at", "body.0.explored"), r"must be torch"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r"entry 'more' is missing or unknown"),
    ],
)
def test_the_history_of_the_topology(change: Change, message: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, "topology_state.safetensors", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("global_step", value=9), "global_step is 9, not 8"),
        (at("global_step", value="8"), "global_step is '8'"),
        (at("global_step", value=-8), "global_step is -8, not 8"),
        (drop("global_step"), "global_step is None, not 8"),
        (at("save_steps", value=0), "save_steps is 0, not this run's 8"),
        (at("logging_steps", value=10**9), "logging_steps is 1000000000, not this run's 500"),
        (at("eval_steps", value=[1]), r"eval_steps is \[1\]"),
        (at("epoch", value=float("nan")), "epoch is nan"),
        (at("train_batch_size", value="4"), "train_batch_size is '4'"),
        (at("train_batch_size", value=None), "train_batch_size is None"),
        (at("best_model_checkpoint", value={}), r"best_model_checkpoint is \{\}"),
        (at("log_history", value="none"), "log_history is 'none'"),
        (at("total_flos", value=None), "total_flos is None"),
        (at("num_input_tokens_seen", value=[]), r"num_input_tokens_seen is \[\]"),
        (at("is_hyper_param_search", value="yes"), "is_hyper_param_search is 'yes'"),
        (at("stateful_callbacks", value=7), "stateful_callbacks is 7"),
        (at("magic", value=1), "'magic' is unknown"),
    ],
)
def test_the_state_of_the_trainer(change: Change, message: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, "trainer_state.json", change, message)


@pytest.mark.parametrize("text", ["", "[]", '{"a": ', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\udc80"])
@pytest.mark.parametrize("file", ["training_state.json", "trainer_state.json", "manifest.json"])
def test_files_that_are_no_json_object(file: str, text: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, "training_state.json", lambda document: None)
    (copy / file).write_bytes(text.encode(errors="surrogateescape"))
    if file == "manifest.json":
        assert damage(copy).startswith("manifest.json is damaged (")
        return
    write_manifest(copy)
    with pytest.raises(RegrowError, match=rf"{re.escape(str(copy / file))} is damaged"):
        resume(copy)


@pytest.mark.parametrize(
    "entry", [None, [], {}, {"bytes": float("inf"), "blake2b": ""}, {"bytes": "x", "blake2b": ""}, {"bytes": 3}]
)
@pytest.mark.parametrize("name", ["model.safetensors", "../model.safetensors", "", "x" * 5000, "a\0b", "."])
def test_manifests_that_nobody_wrote(name: str, entry: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"123")
    (tmp_path / "manifest.json").write_text(json.dumps({name: entry}))
    assert "is damaged (" in damage(tmp_path)


@pytest.mark.parametrize("file", ["model", "training_state", "topology_state"])
def test_truncated_tensors_with_a_manifest_that_agrees(file: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, "training_state.json", lambda document: None)
    path = copy / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write_manifest(copy)
    with pytest.raises(RegrowError, match=re.escape(f"{path} is damaged (")):
        resume(copy)


def refused(checkpoint: Path, tmp_path: Path, file: str, change: Change, message: str) -> None:
    copy = changed(checkpoint, tmp_path, file, change)
    with pytest.raises(RegrowError) as error:
        resume(copy)
    text = str(error.value)
    assert text.startswith(str(copy / file)) and "\n" not in text
    assert re.search(message, text), text


def test_masks_of_another_density() -> None:
    layers = mask_linears(nn.Sequential(nn.Linear(16, 32)), density=0.25, block_size=4)
    training = MaskedTraining(layers, create("acdc"), schedule=UpdateSchedule(12, 4), seed=1)
    for n_steps, blocks in ((0, 32), (3, 8), (12, 8)):
        layers[0].mask.fill_(False).view(-1)[:blocks] = True
        training.load_state_dict({"counters": torch.tensor([n_steps])})
        layers[0].mask.view(-1)[blocks - 1] = False
        with pytest.raises(RegrowError, match=rf"0\.mask must hold {blocks} blocks in step {n_steps}"):
            training.load_state_dict({"counters": torch.tensor([n_steps])})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(bert_config("1/64", vocab_size=60, max_length=16), density=0.4, block_size=16).save_pretrained(folder)
    return folder


QUERY = "bert.encoder.layer.0.attention.self.query"


def no_layer(document: dict[str, Any]) -> None:
    del document["quantization_config"]["layers"][QUERY]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", become(f"{QUERY}.topology.slot", torch.Tensor.long), "slot must be I32, not I64"),
        ("model.safetensors", become(f"{QUERY}.topology.row_ptr", torch.Tensor.float), "row_ptr must be I32, not F32"),
        ("model.safetensors", become(f"{QUERY}.values", torch.Tensor.int), "values must be F32, not I32"),
        ("model.safetensors", put(f"{QUERY}.topology.slot", 0, -1), "slot must lie in"),
        ("model.safetensors", put(f"{QUERY}.topology.row_ptr", 1, 2**30), "row_ptr must rise"),
        (
            "model.safetensors",
            swap(f"{QUERY}.topology.row_ptr", f"{QUERY}.topology.col_idx"),
            r"must be \[\d\] by config\.json, not \[\d\]",
        ),
        ("model.safetensors", become(f"{QUERY}.values", lambda t: t[1:]), r"must be \[6, 16, 16\] by config\.json"),
        ("model.safetensors", None, "is damaged"),
        ("config.json", no_layer, "belongs to no sparse layer that config.json lists"),
    ],
)
def test_saved_models(file: str, change: Change | None, message: str, saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / file
    if change is None:
        path.write_bytes(path.read_bytes()[:-1])
    elif file == "config.json":
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RegrowError, match=message) as error:
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value) or QUERY in str(error.value)
