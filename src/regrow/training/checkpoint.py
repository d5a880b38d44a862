"""Optimizer, scheduler and random state on disk: safetensors and JSON, never pickle.

A checkpoint directory holds the model as ``save_pretrained`` writes it and, from here:

``training_state.safetensors``  every tensor of the optimizer, and the random state of every rank
``training_state.json``         everything else: parameter groups, scheduler, plain numbers
``topology_state.safetensors``  :meth:`regrow.TopologyUpdater.state_dict`
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import set_seed

from regrow.errors import RegrowError
from regrow.ranks import gathered, rank, world_size
from regrow.shards import shared_out, whole_on_first
from regrow.training import checks
from regrow.training.seeds import mix

TENSORS_FILE = "training_state.safetensors"
JSON_FILE = "training_state.json"
TOPOLOGY_FILE = "topology_state.safetensors"

_KINDS = ("torch", "numpy", "python", "cuda")


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, on rank 0 with all rows of every entry; all ranks must call this together."""
    state = optimizer.state_dict()
    entries = {
        index: {name: whole_on_first(entry) if isinstance(entry, Tensor) else entry for name, entry in of_one.items()}
        for index, of_one in state["state"].items()
    }
    return state | {"state": entries}


def save_training_state(
    folder: Path, state: dict[str, Any], scheduler: Any, extra: dict[str, Any], random_states: dict[str, Tensor]
) -> None:
    """Write optimizer, scheduler and random states; ``extra`` is JSON the caller gets back.

    Args:
        state: of :func:`whole_optimizer_state`.
        random_states: of :func:`gathered_random_states`.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, entry in entries.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(entry, Tensor):
                tensors[key] = entry.contiguous()
            else:
                numbers[key] = entry
    document = {
        "param_groups": state["param_groups"],
        "optimizer_numbers": numbers,
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
        "extra": extra,
        "ranks": world_size(),
    }
    save_file(tensors | random_states, folder / TENSORS_FILE)
    (folder / JSON_FILE).write_text(json.dumps(document, indent=1))


def load_training_state(folder: Path, optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Restore what :func:`save_training_state` wrote, random state apart; returns ``extra``.

    Raises:
        RegrowError: a file is missing, truncated, belongs to another model or optimizer, or holds what no run writes.
    """
    tensors, document = load_tensors(folder / TENSORS_FILE), load_json(folder / JSON_FILE)
    expected = optimizer.state_dict()["param_groups"]
    saved = document.get("param_groups")
    if not _are_groups(saved) or [g.get("params") for g in saved] != [g["params"] for g in expected]:
        raise RegrowError(f"{folder / JSON_FILE}: its parameter groups are not this run's; resume with the same config")
    state: dict[int, dict[str, Any]] = {}
    wrong = _wrong_document(document) or checks.wrong_groups(saved, expected)
    wrong = wrong or checks.wrong_schedule(document.get("scheduler"), scheduler, saved)
    if wrong:
        raise damaged(folder / JSON_FILE, wrong)
    steps = document["scheduler"].get("last_epoch")
    entries = {**tensors, **document["optimizer_numbers"]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, entry in entries.items():
        kind, _, rest = key.partition(".")
        if kind != "optimizer":
            continue
        index, _, name = rest.partition(".")
        _check_index(folder, key, index, len(parameters))
        wrong = checks.wrong_state(name, entry, parameters[int(index)], _unwrapped(optimizer), steps)
        if wrong:
            raise damaged(folder / (TENSORS_FILE if isinstance(entry, Tensor) else JSON_FILE), f"{key} {wrong}")
        if isinstance(entry, Tensor):
            entry = shared_out(entry, parameters[int(index)])
        state.setdefault(int(index), {})[name] = entry
    for number, found in state.items():
        if lacking := checks.lacking_state(set(found), _unwrapped(optimizer)):
            raise damaged(folder / TENSORS_FILE, f"optimizer.{number}.{lacking} is missing")
    optimizer.load_state_dict({"state": state, "param_groups": saved})
    scheduler.load_state_dict(document["scheduler"] | {"lr_lambdas": [None] * len(scheduler.base_lrs)})
    return document["extra"]


def gathered_random_states() -> dict[str, Tensor]:
    """The random state of every rank, on every rank; all must call this together."""
    by_rank = {name: gathered(state) for name, state in _random_state().items()}
    return {_random_key(name, r): state for name, states in by_rank.items() for r, state in enumerate(states)}


def load_random_state(folder: Path) -> None:
    """Put the random generators of torch, numpy and Python where the checkpoint left those of this rank.

    A rank that the checkpoint does not know begins anew, from a seed that rank 0's state gives it.

    Raises:
        RegrowError: a state is missing, or none that a generator can have.
    """
    tensors, own, ranks = load_tensors(folder / TENSORS_FILE), rank(), ranks_of(folder)
    known = own < ranks
    for of_rank in {own if known else 0, ranks - 1}:
        if wrong := checks.wrong_random(tensors, {kind: _random_key(kind, of_rank) for kind in _KINDS}):
            raise damaged(folder / TENSORS_FILE, wrong)
    state = {name: tensors[key] for name in _KINDS if (key := _random_key(name, own if known else 0)) in tensors}
    try:
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
    except (RuntimeError, TypeError) as error:
        key = _random_key("torch", own if known else 0)
        raise damaged(folder / TENSORS_FILE, f"{key}: {str(error).splitlines()[0]}") from None
    words, position = state["numpy"][:-1], state["numpy"][-1]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), int(position), 0, 0.0))
    version, *internal = state["python"].tolist()
    random.setstate((version, tuple(internal), None))
    if not known:
        seed_rank(int(torch.randint(2**31, ())))


def seed_rank(seed: int) -> None:
    """Give this rank random numbers of its own: with the same ones, all would drop the same activations."""
    set_seed(mix(seed, rank(), "rank") % 2**32)


def ranks_of(folder: Path) -> int:
    """How many processes wrote a checkpoint together.

    Raises:
        RegrowError: the file is missing or damaged.
    """
    ranks = load_json(folder / JSON_FILE).get("ranks", 1)
    if not checks.is_count(ranks) or ranks == 0:
        raise damaged(folder / JSON_FILE, "ranks is no number of processes")
    return ranks


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RegrowError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RegrowError: the file is missing or no JSON object.
    """
    try:
        document = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(document, dict):
        raise damaged(path, "it holds no JSON object")
    return document


def damaged(path: Path, why: object) -> RegrowError:
    """The error for a checkpoint file that is missing, truncated or not what it should be."""
    if isinstance(why, FileNotFoundError):
        why = "missing"
    return RegrowError(f"{path} is damaged ({why}); delete {path.parent} to resume from an older checkpoint")


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, and the folder, to the disk."""
    for path in [*folder.iterdir(), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _are_groups(saved: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(saved, list) and all(isinstance(group, dict) for group in saved)


def _wrong_document(document: dict[str, Any]) -> str | None:
    for name in ("optimizer_numbers", "extra"):
        if not isinstance(document.get(name), dict):
            return f"{name} is missing or no JSON object"
    return None


def _unwrapped(optimizer: Any) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # transformers' Trainer hands over a wrapper


def _check_index(folder: Path, key: str, index: str, n_parameters: int) -> None:
    if len(index) > 9 or not index.isdecimal() or index != str(int(index)) or int(index) >= n_parameters:
        raise RegrowError(f"{folder / TENSORS_FILE}: {key} fits no parameter of this model")


def _random_state() -> dict[str, Tensor]:
    _, key, position, *_ = np.random.get_state()
    version, internal, _ = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(key, position).astype(np.int64)),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_key(name: str, of_rank: int) -> str:
    """``random.torch`` of rank 0, ``random.1.torch`` of the next."""
    return f"random.{name}" if of_rank == 0 else f"random.{of_rank}.{name}"
