"""The Trainer for MLM + NSP pre-training: separate losses, held-out evaluation, progress."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.bert.evaluate import evaluate_pretraining
from regrow.bert.global_batch import GlobalBatch
from regrow.bert.run import GO_ON, RunDirectory, writing
from regrow.bert.stream import PairDataset
from regrow.errors import RegrowError
from regrow.ranks import rank, world_size
from regrow.training import RegrowCallback, SafeTrainer, UpdateRecord
from regrow.training.checkpoint import JSON_FILE, damaged, load_json
from regrow.training.checks import is_count, is_number
from regrow.training.fsdp import parameter_bytes
from regrow.training.metrics import mean_record

_SUMS = ("mlm_loss", "nsp_loss", "steps")


class PretrainingTrainer(SafeTrainer):
    """Logs losses, ``tokens_per_second`` and ``data_wait`` to the run directory and evaluates held-out pairs.

    Tokens are real ones, padding not counted; ``data_wait`` is the share of the time that training waited for batches.
    Every line carries ``tokens`` and ``seconds`` since the start of training; evaluating and writing checkpoints is no
    training time.

    On several ranks losses and tokens are those of all of them; clocks are each rank's own.

    The running sums travel in the checkpoints, so a resumed run logs the same losses as an uninterrupted one, and its
    seconds go on.
    """

    def __init__(self, *args: Any, run: RunDirectory, topology: RegrowCallback | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run, self.topology = run, topology
        if topology is not None:
            topology.on_update = self._log_updates
        self.sums = dict.fromkeys(_SUMS, 0.0)
        self._before = {"tokens": 0, "seconds": 0.0}
        self._training, self._stopped_at = False, 0.0
        self._start_clock()

    def _start_clock(self) -> None:
        self._tokens, self._waited, self._since = 0, 0.0, time.perf_counter()

    def _totals(self) -> dict[str, Any]:
        """Tokens and seconds of training so far, over all restarts."""
        now = self._stopped_at or time.perf_counter()
        seconds = now - self._since if self._training else 0.0
        return {
            "tokens": self._before["tokens"] + self._tokens,
            "seconds": round(self._before["seconds"] + seconds, 3),
        }

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        self._stopped_at = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - self._stopped_at
            self._stopped_at = 0.0

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        whole = parameter_bytes(self.model)
        optimizer = super().create_optimizer(model)
        if self.shard_units and rank() == 0:
            tqdm.write(
                f"process 0 keeps {parameter_bytes(self.model):,} of {whole:,} bytes of weights; likewise of gradients "
                "and of each of the optimizer's moments"
            )
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.base_dataloader.worker_init_fn = partial(_stand_apart, loader.worker_init_fn)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not self._training:  # what came before was preparation
            self._training = True
            self._start_clock()
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - started
        return batches

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs)
        loss = output.loss
        if model.training:
            batch = GlobalBatch.of(output, inputs)
            loss = batch.loss
            self.sums["mlm_loss"] += batch.mlm_loss
            self.sums["nsp_loss"] += batch.nsp_loss
            self.sums["steps"] += 1
            self._tokens += batch.tokens
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        return None  # the loss is a mean over the batch; the Trainer divides it by the accumulation steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            reason = _lost_process(error)
            if reason is None:
                raise
            raise RegrowError(f"{reason}; the run stopped after step {self.state.global_step}") from None

    def extra_state(self) -> dict[str, Any]:
        return {"sums": self.sums, "totals": self._totals()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.sums = {name: float(state["sums"][name]) for name in _SUMS}
        self._before |= state.get("totals", {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint) / JSON_FILE
            if wrong := _wrong_extra(load_json(path).get("extra")):
                raise damaged(path, wrong)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.lr_scheduler.last_epoch != self.state.global_step:
            raise damaged(path, f"scheduler.last_epoch is {self.lr_scheduler.last_epoch}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        what = f"the checkpoint {self.run.checkpoints / f'checkpoint-{step}'}"
        try:
            with self._clock_stopped(), writing(what, f"the run stopped at step {step}; {GO_ON}"):
                super()._save_checkpoint(model, trial)
        except RegrowError:
            self.run.drop_partial()
            raise

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with writing(f"the model in {self.run.path}"):
            super().save_model(*args, **kwargs)

    def _log_updates(self, records: list[UpdateRecord]) -> None:
        self.run.log_updates(records, self._totals())
        super().log({f"update_{name}": value for name, value in mean_record(records).items()})  # for trackers

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._totals()
            logs = {**self._take_means(), **{name: logs[name] for name in ("learning_rate", "grad_norm")}}
            if self.topology is not None and self.topology.updater is not None:
                logs["coverage"] = self.topology.updater.coverage
            self.run.log_metrics({"step": self.state.global_step, **totals, **logs})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        dataset = self.eval_dataset
        assert isinstance(dataset, PairDataset)
        with self._clock_stopped():
            metrics = evaluate_pretraining(
                self.accelerator.unwrap_model(self.model),
                dataset,
                collate_fn=dataset.collate,
                batch_size=self.args.eval_batch_size,
            )
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.run.log_metrics({"step": self.state.global_step, **self._totals(), **metrics})
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # it clears should_evaluate
        return metrics

    def _take_means(self) -> dict[str, float]:
        steps = max(self.sums["steps"], 1.0)
        mlm, nsp = self.sums["mlm_loss"] / steps, self.sums["nsp_loss"] / steps
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = {"tokens_per_second": self._tokens / seconds, "data_wait": self._waited / seconds}
        self.sums = dict.fromkeys(_SUMS, 0.0)
        self._before = self._totals()
        self._start_clock()
        return {"loss": mlm + nsp, "mlm_loss": mlm, "nsp_loss": nsp, **speed}


def _wrong_extra(extra: Any) -> str | None:
    """What of ``extra`` this trainer could not have written. Losses may be infinite where such steps are skipped."""
    if not isinstance(extra, dict):
        return "extra is missing"
    sums, totals = extra.get("sums"), extra.get("totals", {"tokens": 0, "seconds": 0.0})
    if not isinstance(sums, dict) or sums.keys() != set(_SUMS) or any(type(x) is not float for x in sums.values()):
        return "extra.sums are no sums of losses"
    if not is_number(sums["steps"], 0):
        return f"extra.sums.steps is {sums['steps']}"
    if not isinstance(totals, dict) or totals.keys() != {"tokens", "seconds"}:
        return "extra.totals are not tokens and seconds"
    if not is_count(totals["tokens"]) or not is_number(totals["seconds"], 0):
        return "extra.totals are no tokens and seconds that a run has"
    return None


def _lost_process(error: RuntimeError) -> str | None:
    """Which process was lost and what to do, if an error says that one was."""
    text = str(error)
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", text):
        return (
            "a process that prepares batches was killed (out of memory?): lower --workers, or prepare between steps "
            "with --workers 0, and go on with --resume"
        )
    if world_size() > 1 and re.search(r"[Cc]onnection (closed|reset|refused)|Broken pipe", text):
        return "another process of this training has ended, and said why; start all of them again with --resume"
    return None


def _stand_apart(then: Callable[[int], None], worker: int) -> None:
    """In a process that prepares batches: Ctrl-C and torchrun signal whole groups, but to stop is not its decision."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    then(worker)


class ProgressBar(TrainerCallback):
    """One line that lives: steps, losses, tokens a second, density; evaluations are printed above it."""

    def __init__(self, density: float | None) -> None:
        self.density = density
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "tokens_per_second" in logs:
            fields = {
                "mlm": f"{logs['mlm_loss']:.3f}",
                "nsp": f"{logs['nsp_loss']:.3f}",
                "tok/s": f"{logs['tokens_per_second']:,.0f}",
            }
            if self.density is not None:
                fields["density"] = f"{self.density:.3g}"
            if "coverage" in logs:
                fields["coverage"] = f"{logs['coverage']:.3f}"
            self.bar.set_postfix(fields)
        elif "eval_mlm_loss" in logs:
            self.bar.write(
                f"step {state.global_step}: held-out MLM {logs['eval_mlm_loss']:.4f}, NSP {logs['eval_nsp_loss']:.4f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal tidy, whatever ended the run."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
