"""Topology updates inside the transformers Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.errors import RegrowError
from regrow.methods import DenseLayoutMethod, Method, WeightTransform, create
from regrow.ranks import world_size
from regrow.shards import is_sharded
from regrow.training.checkpoint import TOPOLOGY_FILE, load_tensors
from regrow.training.ddp import keep_indices_local
from regrow.training.masked import MaskedTraining
from regrow.training.metrics import UpdateRecord
from regrow.training.schedule import Decay, UpdateSchedule
from regrow.training.transformed import TransformedTraining
from regrow.training.updater import TopologyUpdater, check_shardable


class RegrowCallback(TrainerCallback):
    """Runs a :class:`~regrow.TopologyUpdater` after every optimizer step of a ``Trainer``.

    ``Trainer(..., callbacks=[RegrowCallback(n_updates=40)])`` is all a training script needs. The updater's state
    travels in every checkpoint and is restored on resume. Started by ``torchrun``, every rank makes the same updates.

    Methods on dense weights want layers of their own, by :func:`regrow.nn.mask_linears` or
    :func:`regrow.nn.transform_linears`; of the latter :func:`regrow.nn.harden` makes ordinary ones after training.

    Args:
        method: a name from ``regrow.methods.available()`` or a :class:`~regrow.methods.Method`.
        n_updates, drop_fraction, decay, final_fraction, stop: see :class:`~regrow.UpdateSchedule`; the total is the
            Trainer's.
        seed: of the updates.
        on_update: called with the records of every update; to read them waits for a GPU.

    Raises:
        RegrowError: at the start of training, if the model has no sparse layer, an argument is out of range, or several
            processes were started but each would train alone.

    Example:
        >>> RegrowCallback("dynsparse", n_updates=4, drop_fraction=0.5).updater is None  # until training begins
        True
    """

    def __init__(
        self,
        method: str | Method = "dynsparse",
        *,
        n_updates: int,
        drop_fraction: float = 0.5,
        decay: Decay = "cosine",
        final_fraction: float = 0.0,
        stop: float = 1.0,
        seed: int = 0,
        on_update: Callable[[Sequence[UpdateRecord]], None] | None = None,
    ) -> None:
        self.method = method
        self.schedule = partial(
            UpdateSchedule,
            n_updates=n_updates,
            drop_fraction=drop_fraction,
            decay=decay,
            final_fraction=final_fraction,
            stop=stop,
        )
        self.seed, self.on_update = seed, on_update
        self.updater: TopologyUpdater | MaskedTraining | TransformedTraining | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if world_size() > 1:
            keep_indices_local(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_together(args)
        schedule = self.schedule(state.max_steps)
        model, method = kwargs["model"], create(self.method) if isinstance(self.method, str) else self.method
        if method.dense_layout and is_sharded(model):
            check_shardable(method)
        if isinstance(method, DenseLayoutMethod):
            self.updater = MaskedTraining(model, method, schedule=schedule, seed=self.seed)
        elif isinstance(method, WeightTransform):
            passes = args.gradient_accumulation_steps
            self.updater = TransformedTraining(model, method, schedule=schedule, seed=self.seed, backward_passes=passes)
        else:
            self.updater = TopologyUpdater(model, kwargs["optimizer"], method, schedule=schedule, seed=self.seed)
        if state.global_step == 0:
            if not isinstance(self.updater, TopologyUpdater):
                self.updater.start()
        else:
            checkpoint = _checkpoint_folder(args, state)
            tensors = load_tensors(checkpoint / TOPOLOGY_FILE)
            try:
                self.updater.load_state_dict(tensors)
            except RegrowError as error:
                raise RegrowError(f"{checkpoint / TOPOLOGY_FILE}: {error}") from None
            if self.updater.n_steps != state.global_step:
                raise RegrowError(f"{checkpoint / TOPOLOGY_FILE} is of step {self.updater.n_steps}, not of this one")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.updater is not None  # on_train_begin ran
        records = self.updater.step()
        if records and self.on_update is not None:
            self.on_update(records)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint_folder(args, state)
        if args.should_save and not (folder / TOPOLOGY_FILE).exists():
            self.save_state(folder)

    def save_state(self, folder: Path) -> None:
        """Write the updater's state into a checkpoint folder."""
        if self.updater is not None:
            save_file(self.updater.state_dict(), folder / TOPOLOGY_FILE)


def _check_together(args: TrainingArguments) -> None:
    """On a CPU transformers trains in every process alone, unless it is told that a CPU is what they train on."""
    if args.world_size < world_size():
        raise RegrowError(
            f"{world_size()} processes were started but each would train alone; on CPUs use "
            "TrainingArguments(use_cpu=True)"
        )


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
