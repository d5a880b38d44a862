"""transformers' Trainer with checkpoints that are atomic, exact and free of pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from regrow.errors import RegrowError
from regrow.nn import named_sparse_layers
from regrow.nn.layout import record_layout
from regrow.shards import is_sharded, whole, whole_state
from regrow.training import checks
from regrow.training.callback import RegrowCallback
from regrow.training.checkpoint import (
    damaged,
    gathered_random_states,
    load_json,
    load_random_state,
    load_training_state,
    save_training_state,
    sync_folder,
    sync_path,
    whole_optimizer_state,
)
from regrow.training.finite import OnNonfinite, first_nonfinite_gradient, gradient_norm, is_finite
from regrow.training.fsdp import shard
from regrow.training.manifest import write_manifest

WEIGHTS_FILE, TRAINER_FILE = "model.safetensors", "trainer_state.json"


class SafeTrainer(Trainer):
    """A ``Trainer`` that writes a checkpoint aside and renames it when complete, in safetensors and JSON only.

    Of several processes rank 0 writes, the random states of all included, and all rows of what is shared out; so a
    checkpoint does not tell how many there were. Everything else is the ``Trainer``'s.
    """

    shard_units: Sequence[nn.Module] = ()
    """Parts of the model, usually its layers, to be given to :func:`regrow.training.fsdp.shard` when training begins;
    none for ``DistributedDataParallel``."""

    def extra_state(self) -> dict[str, Any]:
        """JSON a subclass wants saved with every checkpoint and handed back to :meth:`load_extra_state`."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`extra_state`."""

    on_nonfinite: OnNonfinite = "stop"
    """Where a gradient is not finite: ``"stop"`` with a checkpoint, or ``"skip"`` the step."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        optimizer = super().create_optimizer(model)
        if self.shard_units:  # by now a checkpoint's weights are in the model
            shard(self.model, optimizer, self.shard_units)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
        if not is_finite(norm):  # asked before clipping, which would make every gradient NaN
            self._refuse_step(first_nonfinite_gradient(model), parameters)
        elif self.args.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return whole(norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self._clip_grad_norm(model) if grad_norm is None else grad_norm)

    def _refuse_step(self, where: str, parameters: list[nn.Parameter]) -> None:
        step = self.state.global_step + 1
        if self.on_nonfinite == "skip":
            for parameter in parameters:
                parameter.grad = None  # the optimizer leaves out what has none
            tqdm.write(f"step {step} is left out: the gradient of {where} is not finite")
            return
        self._save_checkpoint(self.model, None)
        raise RegrowError(
            f"the gradient of {where} is not finite in step {step}; the state before it is saved. Lower the learning "
            "rate or raise the warm-up, or resume with --on_nonfinite skip to leave such steps out"
        )

    _saved: tuple[object, int] = (None, 0)
    """State of the training (each has its own) and step of the last checkpoint that was written or loaded."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._saved[1] == self.state.global_step and self._saved[0] is self.state:
            return  # to write it again would first delete it
        # What the ranks hold together, they collect together.
        model_state = whole_state(self.model) if is_sharded(self.model) else None
        optimizer_state, random_states = whole_optimizer_state(self.optimizer), gathered_random_states()
        if self.args.should_save:
            self._write_checkpoint(model_state, optimizer_state, random_states)
        self._saved = self.state, self.state.global_step

    def _write_checkpoint(
        self, model_state: dict[str, Tensor] | None, optimizer_state: dict[str, Any], random_states: dict[str, Tensor]
    ) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        self._save(str(partial), model_state)
        save_training_state(partial, optimizer_state, self.lr_scheduler, self.extra_state(), random_states)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RegrowCallback):
                callback.save_state(partial)
        self.state.save_to_json(str(partial / TRAINER_FILE))
        write_manifest(partial)
        sync_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        sync_path(folder.parent)
        rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir, whole_state(self.model) if is_sharded(self.model) else None)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path, state = (Path(resume_from_checkpoint) / name for name in (WEIGHTS_FILE, TRAINER_FILE))
        number = path.parent.name.rpartition("-")[2]
        step = int(number) if number.isdecimal() else None
        if wrong := checks.wrong_trainer_state(load_json(state), step, self.args):
            raise damaged(state, wrong)
        if wrong := checks.wrong_weights(path, (model or self.model).state_dict()):
            raise damaged(path, wrong)
        try:
            load_model(model or self.model, path)  # knows tied weights; validates indices on the way
        except RegrowError as error:
            raise RegrowError(f"{path}: {error}") from None
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from None
        except RuntimeError as error:
            heading, *lines = str(error).strip().splitlines()
            first = (lines or [heading])[0].strip()
            raise RegrowError(f"{path} does not fit this model ({first}); resume with the same config") from None
        if layers := dict(named_sparse_layers(model or self.model)):
            record_layout(model or self.model, layers)  # the checkpoint may have brought other numbers of blocks

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_extra_state(load_training_state(Path(checkpoint), self.optimizer, self.lr_scheduler))
            self._saved = self.state, self.state.global_step

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint))
