"""What pre-training and fine-tuning have in common: options, and what follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from regrow.bert.fused import Fusions
from regrow.errors import RegrowError
from regrow.methods import Method
from regrow.ranks import world_size
from regrow.training import RegrowCallback, UpdateSchedule
from regrow.training.finite import OnNonfinite
from regrow.training.schedule import Decay

Precision = Literal["float32", "bf16"]
PRECISION_HELP = "bf16: autocast, on a GPU; weights and optimizer state stay float32"


class TrainingOptions:
    """Base of the configurations, which are dataclasses and declare these fields with their defaults and help."""

    block_size: int
    batch_size: int
    learning_rate: float | None
    warmup: float
    max_grad_norm: float
    on_nonfinite: OnNonfinite
    dropout: float | None
    fuse: str
    precision: Precision
    n_updates: int | None
    drop_fraction: float
    decay: Decay
    final_fraction: float
    stop_updates: float
    save_steps: int
    keep_checkpoints: int
    logging_steps: int
    report_to: str
    seed: int

    def schedule_over(self, steps: int) -> UpdateSchedule:
        """When the topology moves, and how much of it; by default about once in 50 steps."""
        n = self.n_updates if self.n_updates is not None else max(min(2, steps), min(160, steps // 50))
        return UpdateSchedule(steps, n, self.drop_fraction, self.decay, self.final_fraction, self.stop_updates)

    def topology_over(self, steps: int, method: Method) -> RegrowCallback:
        """The callback that moves the topology so."""
        schedule = self.schedule_over(steps)
        return RegrowCallback(
            method,
            n_updates=schedule.n_updates,
            drop_fraction=schedule.drop_fraction,
            decay=schedule.decay,
            final_fraction=schedule.final_fraction,
            stop=schedule.stop,
            seed=self.seed,
        )

    @property
    def trackers(self) -> list[str]:
        """``report_to`` as a list of transformers' names; each must be installed."""
        names = [name.strip() for name in self.report_to.split(",") if name.strip() not in ("", "none")]
        installed = get_available_reporting_integrations() if names else []
        for name in names:
            if name not in installed:
                known = ", ".join(["none", *installed])
                raise RegrowError(f"report_to={name!r} is no tracker that is installed here; choose from: {known}")
        return names

    def check_training(self, steps: int) -> None:
        """Raise :class:`RegrowError` for a value that no training can use."""
        for name in ("batch_size", "save_steps", "keep_checkpoints", "logging_steps"):
            if getattr(self, name) < 1:
                raise RegrowError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise RegrowError(f"learning_rate must be positive, got {self.learning_rate}")
        _ = self.schedule_over(steps), Fusions.named(self.fuse), self.trackers
        if self.precision not in get_args(Precision):
            raise RegrowError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if not 0 <= self.warmup <= 1:
            raise RegrowError(f"warmup is a share of the steps in [0, 1], got {self.warmup}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise RegrowError(f"dropout must lie in [0, 1), got {self.dropout}")

    def check_machine(self) -> None:
        """Raise :class:`RegrowError` for what only another machine can do: a study may be planned here for a GPU."""
        if self.precision != "float32" and not torch.cuda.is_available():
            raise RegrowError(f"precision={self.precision!r} needs a CUDA GPU, and there is none; use float32")

    def arguments(self, checkpoints: Path, *, steps: int, eval_steps: int, **more: Any) -> TrainingArguments:
        """What transformers' ``Trainer`` is to know; ``batch_size`` is shared by all processes."""
        return TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=self.batch_size // world_size(),
            per_device_eval_batch_size=self.batch_size // world_size(),
            bf16=self.precision == "bf16",
            use_cpu=world_size() > 1 and not torch.cuda.is_available(),
            lr_scheduler_type="linear",
            warmup_steps=round(self.warmup * steps),
            max_grad_norm=self.max_grad_norm,
            train_sampling_strategy="sequential",  # the shuffling is inside the data set
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            eval_strategy="steps",
            eval_steps=eval_steps,
            save_steps=self.save_steps,
            save_total_limit=self.keep_checkpoints,
            logging_steps=self.logging_steps,
            logging_nan_inf_filter=False,
            seed=self.seed,
            report_to=self.trackers,
            disable_tqdm=True,
            **more,
        )
