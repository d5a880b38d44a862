"""How fast a trained model answers, sparse against dense: ``regrow bench inference``.

Dense is the faster of transformers' BERT with ``scaled_dot_product_attention`` under ``torch.inference_mode``, called
as it is or compiled by ``torch.compile``; and, where it is installed, onnxruntime with all its optimizations and those
of its transformer optimizer. Sparse is the same model prepared by :func:`regrow.bert.inference.prepare`. All get full
sequences of random tokens, return the last hidden state, use the same number of threads, and take turns in one
process; a timed call follows an untimed one of the same model, whose weights are then where they are in a process that
serves one model.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BertModel

from regrow.bench.baseline import measured_machine
from regrow.bench.timing import interleaved_medians
from regrow.bert.inference import prepare
from regrow.bert.sizes import bert_config
from regrow.errors import RegrowError
from regrow.nn import sparsify
from regrow.nn.linear import check_block_size
from regrow.topology.distribution import check_density

EAGER, COMPILED, ONNX = "pytorch", "pytorch_compiled", "onnxruntime"
Answer = Callable[[Tensor], object]


@dataclass(frozen=True)
class InferenceConfig:
    """What is measured: every density with every block size, batch and length."""

    size: str = "small"
    densities: tuple[float, ...] = (0.1,)
    blocks: tuple[int, ...] = (16,)
    batches: tuple[int, ...] = (1, 8, 32)
    lengths: tuple[int, ...] = (16, 128)
    vocab_size: int = 30522
    compiled: bool = False
    """Also the dense model through ``torch.compile``, which takes up to a minute for every shape."""
    onnx: bool = True
    """Also onnxruntime, if it is installed."""
    rounds: int = 15

    def check(self) -> None:
        """Raise :class:`RegrowError` for values that no model can have."""
        for name in ("densities", "blocks", "batches", "lengths"):
            if not getattr(self, name):
                raise RegrowError(f"{name} is empty; give at least one")
        for name, values in (
            ("batch", self.batches),
            ("length", self.lengths),
            ("vocab_size", (self.vocab_size,)),
            ("rounds", (self.rounds,)),
        ):
            if min(values) < 1:
                raise RegrowError(f"{name} must be at least 1, got {min(values)}")
        for density in self.densities:
            check_density(density)
        hidden = bert_config(self.size, vocab_size=self.vocab_size, max_length=max(self.lengths)).hidden_size
        for block in self.blocks:
            check_block_size(hidden, 4 * hidden, block)


def bench_inference(config: InferenceConfig, *, progress: bool = False) -> dict[str, Any]:
    """Measure forward passes, dense and sparse.

    Returns:
        ``dense``: for every batch and length the median seconds of each dense candidate; ``sparse``: for every batch,
        length, density and block ``seconds``, ``over_pytorch`` (seconds of the fastest dense PyTorch over it) and
        ``over_onnxruntime`` (or None); ``config``, ``baseline``, ``notes``, ``machine``.

    Raises:
        RegrowError: a value that no model can have.

    Example:
        >>> config = InferenceConfig("1/32", (0.5,), (16,), (1,), (8,), vocab_size=50, onnx=False, rounds=1)
        >>> result = bench_inference(config)
        >>> result["sparse"][0]["over_pytorch"] == result["dense"][0]["pytorch"] / result["sparse"][0]["seconds"]
        True
    """
    config.check()
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        dense = _dense(config, Path(folder), notes)
        sparse = {(d, b): _answer(_model(config, d, b)) for d in config.densities for b in config.blocks}
        rows: dict[str, list[dict[str, Any]]] = {"dense": [], "sparse": []}
        shapes = [(batch, length) for length in config.lengths for batch in config.batches]
        for batch, length in tqdm(shapes, "measuring", unit="shape", leave=False, disable=not progress):
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(config.vocab_size, (batch, length), generator=draw)
            tasks = {name: _on(answer, ids) for name, answer in (dense | sparse).items()}
            seconds = interleaved_medians(tasks, rounds=config.rounds, warm_up=1, untimed=1)
            shape = {"batch": batch, "length": length}
            rows["dense"].append(shape | {name: seconds[name] for name in dense})
            pytorch = min(seconds[name] for name in (EAGER, COMPILED) if name in dense)
            for density, block in sparse:
                mine = seconds[density, block]
                over = {
                    "over_pytorch": pytorch / mine,
                    "over_onnxruntime": seconds[ONNX] / mine if ONNX in dense else None,
                }
                rows["sparse"].append(shape | {"density": density, "block": block, "seconds": mine} | over)
    baseline = " ".join((__doc__ or "").partition("\n\n")[2].split())
    return rows | {"config": asdict(config), "baseline": baseline, "notes": notes, "machine": measured_machine()}


def _on(answer: Answer, ids: Tensor) -> Callable[[], object]:
    return lambda: answer(ids)


def _answer(model: nn.Module) -> Answer:
    return lambda ids: model(ids).last_hidden_state


def _model(config: InferenceConfig, density: float | None = None, block: int = 16) -> nn.Module:
    torch.manual_seed(0)
    length = max(config.lengths)
    bert = bert_config(config.size, vocab_size=config.vocab_size, max_length=length, dropout=0.0)
    with torch.inference_mode(False):  # parameters of a module that autograd knows
        model = BertModel(bert, add_pooling_layer=False).eval()
        if density is None:
            return model
        return prepare(sparsify(model, density=density, block_size=block, include="encoder.*", init="keep"))


def _dense(config: InferenceConfig, folder: Path, notes: list[str]) -> dict[str, Answer]:
    model = _model(config)
    answers: dict[str, Answer] = {EAGER: _answer(model)}
    if config.compiled:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = len(config.batches) * len(config.lengths) + 1
        answers[COMPILED] = _answer(torch.compile(model, dynamic=False))  # type: ignore[arg-type]
    if config.onnx and all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx")):
        answers[ONNX] = _onnx(model, folder, notes)
    elif config.onnx:
        notes.append('onnxruntime is not installed and was left out; pip install "regrow[onnx]" adds it')
    return answers


class _LastHiddenState(nn.Module):
    """A module of tensors only, as an export wants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state


def _onnx(model: nn.Module, folder: Path, notes: list[str]) -> Answer:
    """The model exported, optimized, and run by as many threads as torch has."""
    onnxruntime = import_module("onnxruntime")
    path = folder / "dense.onnx"
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _LastHiddenState(model),
            (torch.ones(2, 8, dtype=torch.int64),),
            str(path),
            dynamo=False,  # its graphs are those that onnxruntime's optimizer knows
            input_names=["ids"],
            output_names=["hidden"],
            dynamic_axes={"ids": axes, "hidden": axes},
        )
    path = _optimized(path, model, notes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Or its threads would spin on while it is another's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"ids": ids.numpy()})[0]


def _optimized(path: Path, model: Any, notes: list[str]) -> Path:
    """After onnxruntime's own optimizer for transformers, where it is installed."""
    try:
        optimizer = import_module("onnxruntime.transformers.optimizer")
    except ImportError as error:
        notes.append(f"without onnxruntime's transformer optimizer: {error}")
        return path
    sizes = {"num_heads": model.config.num_attention_heads, "hidden_size": model.config.hidden_size}
    better = path.with_name("optimized.onnx")
    optimizer.optimize_model(str(path), model_type="bert", opt_level=0, **sizes).save_model_to_file(str(better))
    return better


def table(result: dict[str, Any]) -> str:
    """The result for people: milliseconds of a forward pass, and ratios to it."""
    dense = {(row["batch"], row["length"]): row for row in result["dense"]}
    names = [name for name in (EAGER, COMPILED, ONNX) if name in result["dense"][0]]
    heads = ["batch x length", *(name.replace("_", " ") for name in names), "density", "block", "sparse"]
    lines = [_line([*heads, "/pytorch", "/onnxruntime"])]
    for row in result["sparse"]:
        shape = row["batch"], row["length"]
        over = row["over_onnxruntime"]
        cells = [f"{shape[0]} x {shape[1]}", *(f"{dense[shape][name] * 1e3:.2f} ms" for name in names)]
        cells += [f"{row['density']:g}", str(row["block"]), f"{row['seconds'] * 1e3:.2f} ms"]
        lines.append(_line([*cells, f"{row['over_pytorch']:.2f}x", "-" if over is None else f"{over:.2f}x"]))
    for density, block in dict.fromkeys((row["density"], row["block"]) for row in result["sparse"]):
        of = [row for row in result["sparse"] if (row["density"], row["block"]) == (density, block)]
        text = f"density {density:g}, block {block}: {_mean(row['over_pytorch'] for row in of):.2f}x dense PyTorch"
        if ONNX in names:
            text += f", {_mean(row['over_onnxruntime'] for row in of):.2f}x onnxruntime"
        lines.append(text + " (geometric means)")
    return "\n".join([*lines, *result["notes"]])


def _line(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>18}" for cell in cells)


def _mean(ratios: Iterable[float]) -> float:
    logs = [log(ratio) for ratio in ratios]
    return exp(sum(logs) / len(logs))


def write_json(result: dict[str, Any], path: Path) -> None:
    """The result as a file."""
    path.write_text(json.dumps(result, indent=1) + "\n")
