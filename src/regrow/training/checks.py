"""What a checkpoint says, checked before anything uses it.

Checksums (:mod:`regrow.training.manifest`) tell accidents. Whoever rewrites a file can rewrite them too, so every
number that is read must be one that a run could have written: of the right kind and size, in its range, and in
agreement with what other files say. Each function here says what is wrong, as ``lr is nan``, or returns ``None``; the
caller knows the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments

from regrow.optim.adamw import BLOCK_STEP
from regrow.topology import BlockTopology, ExploredPositions

MT_WORDS = 624  # of a Mersenne Twister, which numpy and Python draw from

_FLOATS = ("F16", "BF16", "F32", "F64")
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_COUNTERS = ("step", BLOCK_STEP)
_OPTIONAL = {  # what of a TrainerState may be null
    "train_batch_size": int,
    "best_metric": float,
    "best_global_step": int,
    "best_model_checkpoint": str,
    "trial_name": str,
    "trial_params": dict,
}


def is_number(value: object, least: float = float("-inf")) -> bool:
    """Whether a JSON value is a finite number, and not below ``least``.

    >>> [is_number(x) for x in (1, 0.5, True, "1", None, float("nan"), float("inf"), 10**400)]
    [True, True, False, False, False, False, False, False]
    """
    return type(value) in (int, float) and max(least, -1e308) <= value <= 1e308  # type: ignore[operator]


def is_count(value: object, most: float = 2**53) -> bool:
    """Whether a JSON value is a whole number from 0 to ``most``.

    >>> [is_count(x) for x in (0, 7, -1, 7.0, True, 10**30)]
    [True, True, False, False, False, False]
    """
    return type(value) is int and 0 <= value <= most


def header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of a safetensors file, which are all that is read.

    Raises:
        SafetensorError, OSError: the file is missing or damaged.
    """
    if not path.is_file():  # safe_open knows no difference
        raise FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}


def wrong_type(found: str, expected: Tensor, *, exact: bool = True) -> str | None:
    """What is wrong with a tensor of a file that is to become ``expected``; ``exact`` lets no float be another float.

    >>> wrong_type("F64", torch.zeros(1)), wrong_type("F64", torch.zeros(1), exact=False)
    ('must be F32, not F64', None)
    """
    wanted = _NAMES.get(expected.dtype, str(expected.dtype))
    fits = found == wanted or (not exact and expected.is_floating_point() and found in _FLOATS)
    return None if fits else f"must be {wanted}, not {found}"


def wrong_weights(path: Path, expected: Mapping[str, Tensor]) -> str | None:
    """A tensor whose type is not the model's: copying would silently convert it. Names and shapes are torch's job."""
    try:
        found = header(path)
    except (SafetensorError, OSError) as error:
        return "missing" if isinstance(error, FileNotFoundError) else str(error)
    for name, (dtype, _) in found.items():
        wrong = wrong_type(dtype, expected[name]) if name in expected else None
        if wrong:
            return f"{name} {wrong}"
    return None


def wrong_groups(saved: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> str | None:
    """An option of a parameter group that is not this run's. Only the learning rate moves while training.

    >>> mine = [{"params": [0], "lr": 0.1, "betas": (0.9, 0.999)}]
    >>> wrong_groups([{"params": [0], "lr": 0.05, "betas": [0.9, 0.999]}], mine)
    >>> wrong_groups([{"params": [0], "lr": float("nan"), "betas": [0.9, 0.999]}], mine)
    'lr of parameter group 0 is nan'
    >>> wrong_groups([{"params": [0], "lr": 0.05, "betas": [0.9, 5]}], mine)
    "betas of parameter group 0 is [0.9, 5], not this run's [0.9, 0.999]"
    """
    for index, (group, own) in enumerate(zip(saved, json.loads(json.dumps(expected)), strict=True)):
        if group.keys() != own.keys():
            odd = sorted(group.keys() ^ own.keys())[0]
            return f"{odd!r} of parameter group {index} is missing or unknown"
        if not is_number(group.get("lr", 0), 0):
            return f"lr of parameter group {index} is {_shown(group['lr'])}"
        for name, value in own.items():
            if name != "lr" and (group[name] != value or type(group[name]) is not type(value)):
                return f"{name} of parameter group {index} is {_shown(group[name])}, not this run's {_shown(value)}"
    return None


def wrong_schedule(saved: object, scheduler: Any, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """What of a scheduler's state no run with this one's configuration could have written."""
    own = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        return "scheduler has other entries than this run's"
    for name, value in own.items():
        if not _is_like(saved[name], value):
            return f"scheduler.{name} is {_shown(saved[name])}"
    if saved.get("base_lrs") != own.get("base_lrs"):
        return f"scheduler.base_lrs is {_shown(saved['base_lrs'])}, not this run's {_shown(own['base_lrs'])}"
    for name in ("last_epoch", "_step_count"):
        if not is_count(saved.get(name, 0)):
            return f"scheduler.{name} is {_shown(saved[name])}"
    if type(scheduler) is LambdaLR:
        step = saved["last_epoch"]
        rates = [base * rule(step) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        if [group["lr"] for group in groups] != rates or saved["_last_lr"] != rates:
            return f"lr is not what the schedule gives at step {step}"
    return None


def wrong_state(
    name: str, entry: object, parameter: Tensor, optimizer: Optimizer, steps: int | None = None
) -> str | None:
    """What is wrong with one entry of an optimizer's state, read for ``parameter``.

    A tensor may be as large as the parameter, one number per block, or one number. Of Adam, whose fused kernels take
    sizes on trust, it is known which.

    Args:
        steps: how many steps were taken, if that is known.

    >>> weight = torch.nn.Parameter(torch.zeros(3, 2, 2))
    >>> adam = torch.optim.Adam([weight])
    >>> wrong_state("exp_avg", torch.zeros(3, 2, 2), weight, adam)
    >>> wrong_state("exp_avg", torch.zeros(3), weight, adam)
    'must be float32 [3, 2, 2], not float32 [3]'
    >>> wrong_state("step", torch.tensor(1e9), weight, adam, steps=7)
    'must lie between 0 and 7'
    """
    if not isinstance(entry, Tensor):
        fits = entry is None or isinstance(entry, bool) or is_number(entry)
        return None if fits and not _is_adam(optimizer) else f"is {_shown(entry)}"
    shapes: list[list[int]] = [list(parameter.shape), [parameter.shape[0]] if parameter.dim() else [], []]
    dtypes = [parameter.dtype]
    if _is_adam(optimizer):
        by_name = {"step": shapes[2], BLOCK_STEP: shapes[1]}
        if name not in (*_adam_entries(optimizer), BLOCK_STEP) or (name == BLOCK_STEP and parameter.dim() != 3):
            return "is unknown to the optimizer"
        shapes = [by_name.get(name, shapes[0])]
    if name in _COUNTERS or entry.dim() == 0:
        dtypes.append(torch.float32)
    if list(entry.shape) not in shapes or entry.dtype not in dtypes:
        wanted = f"{_dtype(dtypes[0])} {' or '.join(map(str, shapes))}"
        return f"must be {wanted}, not {_dtype(entry.dtype)} {list(entry.shape)}"
    if bool(entry.isnan().any()):
        return "holds NaN"
    if name in _COUNTERS and bool(((entry < 0) | (entry > _most(steps))).any()):
        return f"must lie between 0 and {_most(steps)}"
    if name in _NEVER_NEGATIVE and bool((entry < 0).any()):
        return "holds a negative number"
    return None


def lacking_state(names: set[str], optimizer: Optimizer) -> str | None:
    """An entry without which a parameter's state is no use: Adam's are known."""
    missing = sorted(set(_adam_entries(optimizer)) - names) if _is_adam(optimizer) else []
    return missing[0] if missing else None


def wrong_random(tensors: Mapping[str, Tensor], key_of: Mapping[str, str]) -> str | None:
    """What is wrong with the random states ``torch``, ``numpy`` and ``python``, whose keys ``key_of`` gives.

    numpy reads as many words behind its 624 as a wrong position says, and draws from zeros alone never end.
    """
    shapes = {"torch": torch.get_rng_state().shape, "numpy": (MT_WORDS + 1,), "python": (MT_WORDS + 2,)}
    for kind, shape in shapes.items():
        key = key_of[kind]
        if key not in tensors:
            return f"{key} is missing"
        state, dtype = tensors[key], torch.uint8 if kind == "torch" else torch.int64
        if state.dtype != dtype or state.shape != shape:
            return f"{key} must be {_dtype(dtype)} {list(shape)}, not {_dtype(state.dtype)} {list(state.shape)}"
        if kind == "torch":
            continue  # torch looks at it itself
        words, position = state[-MT_WORDS - 1 : -1], int(state[-1])
        if bool(((words < 0) | (words >= 2**32)).any()) or not bool(words[1:].any()):
            return f"{key} holds words that no generator has"
        if not 0 <= position <= MT_WORDS or (kind == "python" and int(state[0]) != 3):
            return f"{key} is at no position of a generator"
    return None


def wrong_counters(n_steps: int, last_update_step: int) -> str | None:
    """Steps are counted from 0; -1 is before the first update.

    >>> wrong_counters(10, 4), wrong_counters(10, 11)
    (None, 'counters are 10 steps with the last update at 11')
    """
    if n_steps >= 0 and -1 <= last_update_step <= n_steps:
        return None
    return f"counters are {n_steps} steps with the last update at {last_update_step}"


def wrong_history(
    topology: BlockTopology, bits: Tensor, allocated_at: Tensor, start_blocks: int, n_steps: int
) -> str | None:
    """What is wrong with the history of one layer, of the right types and shapes."""
    explored = ExploredPositions(topology.n_positions)
    explored.bits = bits
    surplus = len(bits) * 8 - topology.n_positions
    if surplus and int(bits[-1]) >> (8 - surplus):
        return "explored holds positions that the layer does not have"
    if not bool(explored.contains(topology.keys().cpu()).all()):
        return "explored lacks positions that hold a block"
    if bool((allocated_at < 0).any()) or bool((allocated_at > n_steps).any()):
        return f"allocated_at must lie between 0 and {n_steps}"
    if not 1 <= start_blocks <= topology.n_positions:
        return f"start_blocks must lie between 1 and {topology.n_positions}, got {start_blocks}"
    return None


def wrong_transform_state(state: Mapping[str, Tensor]) -> str | None:
    """What is wrong with any state of a transformed layer; the method knows the rest.

    >>> wrong_transform_state({"logits": torch.tensor([0.0, float("nan")])})
    'logits holds NaN or infinity'
    """
    odd = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    return f"{odd[0]} holds NaN or infinity" if odd else None


def wrong_trainer_state(saved: Mapping[str, Any], step: int | None, arguments: TrainingArguments) -> str | None:
    """What of ``trainer_state.json`` is no state of this run after ``step`` steps; the Trainer believes all of it."""
    usual = vars(TrainerState())
    unknown = sorted(saved.keys() - usual.keys())
    if unknown:
        return f"{unknown[0]!r} is unknown"
    for name, value in saved.items():
        if not (_is_like(value, usual[name]) or (name in _OPTIONAL and isinstance(value, _OPTIONAL[name]))):
            return f"{name} is {_shown(value)}"
    if not is_count(saved.get("global_step")) or step not in (None, saved["global_step"]):
        return f"global_step is {_shown(saved.get('global_step'))}, not {step}"
    for name in ("logging_steps", "eval_steps", "save_steps"):
        own, value = getattr(arguments, name), saved.get(name, 1)
        if not is_number(value, 1) or (own is not None and own >= 1 and own != value):
            return f"{name} is {_shown(value)}, not this run's {_shown(own)}"
    if not is_count(saved.get("train_batch_size")):  # the Trainer divides it
        return f"train_batch_size is {_shown(saved.get('train_batch_size'))}"
    return None


def _is_like(value: object, own: object) -> bool:
    """Of one kind in JSON: both numbers, both truth values, both lists (as long, if of numbers), ..."""
    if isinstance(own, bool) or own is None:
        return type(value) is type(own)
    if isinstance(own, int | float):
        return is_number(value)
    if isinstance(own, list | tuple) and own:
        return isinstance(value, list) and len(value) == len(own) and all(map(_is_like, value, own))
    return isinstance(value, list if isinstance(own, tuple) else type(own))


def _is_adam(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam)  # AdamW is one


def _adam_entries(optimizer: Optimizer) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if optimizer.defaults.get("amsgrad") else ()))


def _most(steps: int | None) -> int:
    return 2**53 if steps is None else steps


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: object) -> str:
    """A value of a file, short enough for a line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
