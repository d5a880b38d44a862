"""Flags of small recipes, and how to press Ctrl-C in one."""

import os
import signal
from pathlib import Path

import pytest

from regrow.bert.progress import ProgressBar

STEPS = 12
TRAINING = {
    "size": "1/32/2",
    "block_size": 8,
    "vocab_size": 200,
    "steps": STEPS,
    "batch_size": 4,
    "max_length": 32,
    "dropout": 0.1,  # so that what goes on must restore the random state
    "logging_steps": 5,
    "heldout_fraction": 0.2,
    "learning_rate": 2e-3,
    "seed": 3,
}


def flags(corpus: Path, output: Path, **changes: object) -> list[str]:
    options = TRAINING | {"data": corpus, "output": output} | changes
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def interrupt_at(step: int, run: str, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a step of the run in a folder of that name."""
    original = ProgressBar.on_step_begin

    def press_ctrl_c(self, args, state, control, **kwargs):
        if state.global_step == step - 1 and Path(args.output_dir).parent.name == run:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    patch.setattr(ProgressBar, "on_step_begin", press_ctrl_c)
