"""transformers' Trainer with checkpoints that are atomic, exact and free of pickle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from regrow.errors import RegrowError
from regrow.training.callback import RegrowCallback
from regrow.training.checkpoint import (
    damaged,
    gathered_random_states,
    load_random_state,
    load_training_state,
    save_training_state,
    sync_folder,
)

WEIGHTS_FILE = "model.safetensors"


class SafeTrainer(Trainer):
    """A ``Trainer`` that writes a checkpoint aside and renames it when complete, in safetensors and JSON only.

    Of several processes rank 0 writes, the random states of all included. Everything else is the ``Trainer``'s.
    """

    def extra_state(self) -> dict[str, Any]:
        """JSON a subclass wants saved with every checkpoint and handed back to :meth:`load_extra_state`."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`extra_state`."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        random_states = gathered_random_states()  # of all ranks, so all take part
        if self.args.should_save:
            self._write_checkpoint(random_states)

    def _write_checkpoint(self, random_states: dict[str, Tensor]) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        self._save(str(partial))
        save_training_state(partial, self.optimizer, self.lr_scheduler, self.extra_state(), random_states)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RegrowCallback):
                callback.save_state(partial)
        self.state.save_to_json(str(partial / "trainer_state.json"))
        sync_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_FILE
        try:
            load_model(model or self.model, path)  # knows tied weights; validates indices on the way
        except RegrowError as error:
            raise RegrowError(f"{path}: {error}") from None
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from None
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise RegrowError(f"{path} does not fit this model ({first}); resume with the same config") from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_extra_state(load_training_state(Path(checkpoint), self.optimizer, self.lr_scheduler))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint))
