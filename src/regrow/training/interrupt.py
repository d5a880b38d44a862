"""Ctrl-C loses nothing."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.ranks import highest, rank


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM finishes the step in flight, saves a checkpoint and stops; a second one stops at once.

    Ranks get a signal at different steps, or not at all, so after every step they ask each other.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if bool(highest(torch.tensor(self.received is not None, dtype=torch.uint8))):
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.restore()
        if rank() == 0:
            print("\nstopping after this step and saving a checkpoint; press Ctrl-C again to quit now", file=sys.stderr)
