"""What a saved model's sparse layers look like now, and what its run's log says of how they came to be so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from regrow.bert.model import dense_bytes, stored_bytes
from regrow.bert.run import CHECKPOINTS, TOPOLOGY_LOG, RunDirectory
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, density_of, named_sparse_layers
from regrow.nn.replace import built_places, dense_elements
from regrow.topology import ExploredPositions
from regrow.training.checkpoint import TOPOLOGY_FILE, damaged, load_tensors
from regrow.training.checks import header, is_count, is_number, wrong_counters, wrong_history


@dataclass(frozen=True)
class LayerHistory:
    """How one layer's pattern has moved.

    Args:
        coverage: share of block positions that were ever active, in (0, 1].
        churn: share of the positions after the last update that were empty before it; None where only the state of a
            checkpoint is left, which does not hold the pattern before.
        last_update: optimizer step of the last update; None before the first.
    """

    coverage: float
    churn: float | None
    last_update: int | None


@dataclass(frozen=True)
class LayerReport:
    r"""One sparse layer in numbers.

    Args:
        name: qualified module name.
        out_features, in_features: shape of the weight ``W``.
        block_size, n_blocks, density: edge of a block, how many there are, and their share of all positions.
        norm: Frobenius norm :math:`\sqrt{\sum w^2}`; absent blocks are zeros.
        mean_abs: mean :math:`|w|` over the elements of existing blocks.
        dead_outputs, dead_inputs: rows and columns of ``W`` that hold nothing but zeros; such an output is its bias.
        history: None where none is saved with the model.
    """

    name: str
    out_features: int
    in_features: int
    block_size: int
    n_blocks: int
    density: float
    norm: float
    mean_abs: float
    dead_outputs: int
    dead_inputs: int
    history: LayerHistory | None = None


@dataclass(frozen=True)
class Inspection:
    """All chosen sparse layers of a model, and the model as a whole.

    Args:
        model_class: name of the class.
        layers: in the order of ``named_modules``.
        density: share of the weights of these layers together that exist.
        parameters, dense_parameters: of the whole model, as it is and with ``nn.Linear`` for every sparse layer.
        stored_bytes, dense_bytes: the same of what is saved, indices included.
        options: how many layers are of each other option than plain blocks, by its name.
    """

    model_class: str
    layers: tuple[LayerReport, ...]
    density: float
    parameters: int
    dense_parameters: int
    stored_bytes: int
    dense_bytes: int
    options: dict[str, int] = field(default_factory=dict)


def inspect_model(
    model: nn.Module, *, layers: str = "*", history: Mapping[str, LayerHistory] | None = None
) -> Inspection:
    """Look at the sparse layers of a model; nothing is changed.

    Args:
        layers: glob over qualified module names that chooses some.
        history: by layer, as :func:`read_history` finds it.

    Raises:
        RegrowError: there is no sparse layer, or the glob matches none.

    Example:
        >>> model = nn.Sequential(BlockSparseLinear(32, 64, block_size=16, density=0.25))
        >>> report = inspect_model(model)
        >>> report.layers[0].n_blocks, report.density, report.dense_parameters - report.parameters
        (2, 0.25, 1536)

    Reference: coverage and churn are those of Dietrich et al. 2021, arXiv 2108.06277, section 4.
    """
    chosen = sparse_layers(model, layers)
    history = history or {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    named = tqdm(chosen.items(), desc="inspecting", leave=False, delay=2)  # a small model needs no bar
    return Inspection(
        model_class=type(model).__name__,
        layers=tuple(inspect_layer(name, layer, history.get(name)) for name, layer in named),
        density=density_of(chosen.values()),
        parameters=parameters,
        dense_parameters=dense_elements(model),
        stored_bytes=stored_bytes(model),
        dense_bytes=dense_bytes(model),
        options=dict(Counter(built.option.name for _, _, built in built_places(model))),
    )


def sparse_layers(model: nn.Module, glob: str = "*") -> dict[str, BlockSparseLinear]:
    """The sparse layers whose qualified name matches.

    Raises:
        RegrowError: there is no sparse layer, or the glob matches none.
    """
    found = dict(named_sparse_layers(model))
    if not found:
        raise RegrowError(f"{type(model).__name__} is dense: it has no sparse layer to inspect")
    chosen = {name: layer for name, layer in found.items() if fnmatchcase(name, glob)}
    if not chosen:
        raise RegrowError(
            f"layers {glob!r} matches none of the {len(found)} sparse layers, such as {next(iter(found))}"
        )
    return chosen


@torch.no_grad()
def inspect_layer(name: str, layer: BlockSparseLinear, history: LayerHistory | None = None) -> LayerReport:
    """One layer in numbers; its dense weight is never formed.

    Example:
        >>> layer = BlockSparseLinear(32, 32, block_size=16, density=0.25)
        >>> _ = layer.values.data.fill_(0.5)[:, 0].zero_()  # the first of 16 rows
        >>> report = inspect_layer("0", layer)
        >>> report.norm, report.mean_abs, report.dead_outputs, report.dead_inputs
        (7.745966692414834, 0.46875, 17, 16)
    """
    rows, cols = layer.topology.coordinates()
    used = layer.values != 0  # NaN is
    topology = layer.topology
    return LayerReport(
        name=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        block_size=layer.block_size,
        n_blocks=topology.n_blocks,
        density=topology.density,
        norm=float(torch.linalg.vector_norm(layer.values, dtype=torch.float64)),
        mean_abs=float(layer.values.abs().mean(dtype=torch.float64)),
        dead_outputs=_unused(used.any(2), rows, topology.n_block_rows),
        dead_inputs=_unused(used.any(1), cols, topology.n_block_cols),
        history=history,
    )


def read_history(path: str | Path) -> dict[str, LayerHistory]:
    """What the log of a run says of how its layers' patterns moved; layers that never moved are not in it.

    Args:
        path: directory of a run, or of one of its checkpoints, for which only updates before it count. Any other
            folder has no log.

    Raises:
        RegrowError: the log is damaged.
    """
    folder = Path(path).resolve()
    run, until = RunDirectory(folder), None
    match = re.fullmatch(r"checkpoint-(\d{1,18})", folder.name)
    if match and folder.parent.name == CHECKPOINTS:
        run, until = RunDirectory(folder.parent.parent), int(match[1])
    if not run.begun:
        return {}
    log = run.path / TOPOLOGY_LOG
    try:
        updates = run.read_updates()
    except (OSError, ValueError) as error:
        raise RegrowError(f"{log} cannot be read ({error}); move it away to inspect without it") from None
    found: dict[str, LayerHistory] = {}
    for update in updates:
        if wrong := _wrong_update(update):
            raise RegrowError(f"{log} is damaged ({wrong}); move it away to inspect without it")
        if until is None or update["step"] <= until:  # a run may have gone on since
            found[update["layer"]] = LayerHistory(update["coverage"], update["churn"], update["step"])
    return found


def checkpoint_history(folder: str | Path, model: nn.Module) -> dict[str, LayerHistory]:
    """What a checkpoint's topology state says of the layers of its model; empty if the folder holds none.

    Raises:
        RegrowError: the file is damaged, or belongs to another model.
    """
    path = Path(folder) / TOPOLOGY_FILE
    if not path.is_file():
        return {}
    state = load_tensors(path)
    n_steps, last = _numbers(path, state)
    found = {}
    for name, layer in named_sparse_layers(model):
        explored = ExploredPositions(layer.topology.n_positions)
        expected = {
            "explored": explored.bits,
            "allocated_at": torch.zeros(layer.topology.n_blocks, dtype=torch.int32),
            "start_blocks": torch.tensor(0),
        }
        parts = {part: _part(path, state, f"{name}.{part}", like) for part, like in expected.items()}
        explored.bits, allocated_at, start = parts.values()
        if wrong := wrong_history(layer.topology, explored.bits, allocated_at, int(start), n_steps):
            raise damaged(path, f"{name}: {wrong}")
        # An update need not move every layer; where it only takes blocks away, none that is left tells when.
        newest = int(allocated_at.max()) if int(start) == layer.topology.n_blocks else max(last, 0)
        found[name] = LayerHistory(explored.coverage, None, newest or None)
    return found


def masked_layers(folder: str | Path) -> list[str]:
    """Names of dense layers saved with a mask, as the method acdc trains them: their weights look dense in every way.

    Raises:
        RegrowError: a file is damaged.
    """
    found: dict[str, Any] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            found |= header(path)
        except (SafetensorError, OSError) as error:
            raise RegrowError(f"{path} is damaged ({error})") from None
    names = (name.removesuffix(".mask") for name, (dtype, _) in found.items() if dtype == "BOOL")
    return [name for name in names if f"{name}.mask" in found and f"{name}.weight" in found]


def _unused(used: Tensor, index: Tensor, n: int) -> int:
    """How many of ``n * b`` lines are used by no block; ``used`` is [n_blocks, b], ``index`` the blocks' places."""
    counts = torch.zeros(n, used.shape[1], dtype=torch.int64, device=used.device)
    return int((counts.index_add_(0, index, used.long()) == 0).sum())


def _wrong_update(update: Mapping[str, Any]) -> str | None:
    if not is_count(update.get("step")) or not isinstance(update.get("layer"), str):
        return "an update without step or layer"
    for name in ("coverage", "churn"):
        if not is_number(update.get(name), 0) or update[name] > 1:
            return f"{name} of {update['layer']} in step {update['step']} does not lie between 0 and 1"
    return None


def _numbers(path: Path, state: Mapping[str, Tensor]) -> tuple[int, int]:
    n_steps, last = _part(path, state, "counters", torch.zeros(2, dtype=torch.int64)).tolist()
    if wrong := wrong_counters(n_steps, last):
        raise damaged(path, wrong)
    return n_steps, last


def _part(path: Path, state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    tensor = state.get(name)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise damaged(path, f"{name} must be {like.dtype} {list(like.shape)}")
    return tensor
