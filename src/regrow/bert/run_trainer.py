"""A Trainer that works in a run directory: logs, clocks, checkpoints, and errors in one line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from regrow.bert.progress import ProgressBar
from regrow.bert.run import GO_ON, RunDirectory, writing
from regrow.errors import RegrowError
from regrow.nn import harden
from regrow.ranks import wait_for_all, world_size
from regrow.training import RegrowCallback, SafeTrainer, UpdateRecord
from regrow.training.checkpoint import JSON_FILE, damaged, load_json
from regrow.training.checks import is_count, is_number
from regrow.training.interrupt import StopOnSignal
from regrow.training.metrics import mean_record

_DEATH_IS_TOLD = 1.0
"""Seconds within which the system tells of a process that has closed its connections."""


class RunTrainer(SafeTrainer):
    """Trains in a run directory, from a checkpoint or from the start, until it is done or stopped by a signal.

    Logs losses, ``tokens_per_second`` and ``data_wait`` there.

    Tokens are real ones, padding not counted; ``data_wait`` is the share of the time that training waited for batches.
    Every line carries ``tokens`` and ``seconds`` since the start of training; evaluating and writing checkpoints is no
    training time.

    On several ranks losses and tokens are those of all of them; clocks are each rank's own.

    The running sums travel in the checkpoints, so a resumed run logs the same losses as an uninterrupted one, and its
    seconds go on.

    A subclass calls :meth:`count` in every training step and evaluates between ``with self.clock_stopped()``.
    """

    losses: tuple[str, ...] = ("loss",)
    """Names of the losses that :meth:`count` is given."""
    evaluates_first = False
    """Whether the log begins with an evaluation of the untrained model."""

    def __init__(
        self,
        *args: Any,
        run: RunDirectory,
        topology: RegrowCallback | None,
        progress: ProgressBar,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.run, self.topology = run, topology
        self._stop, self._progress = StopOnSignal(), progress
        ours = [self._stop, progress] if topology is None else [topology, self._stop, progress]
        super().__init__(*args, callbacks=[*ours, *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        if topology is not None:
            topology.on_update = self._log_updates
        self.sums = self._no_sums()
        self._before = {"tokens": 0, "seconds": 0.0}
        self._training, self._stopped_at = False, 0.0
        self._start_clock()

    def count(self, losses: dict[str, float], tokens: int) -> None:
        """Take one step's losses and tokens into the log's next line."""
        for name, value in losses.items():
            self.sums[name] += value
        self.sums["steps"] += 1
        self._tokens += tokens

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside is no training time."""
        self._stopped_at = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - self._stopped_at
            self._stopped_at = 0.0

    def log_evaluation(self, metrics: dict[str, float]) -> dict[str, float]:
        """Write held-out ``metrics`` to the run's log and to trackers; returns them with ``eval_`` before each name."""
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.run.log_metrics({"step": self.state.global_step, **self._totals(), **metrics})
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # it clears should_evaluate
        return metrics

    def _no_sums(self) -> dict[str, float]:
        return dict.fromkeys((*self.losses, "steps"), 0.0)

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

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.base_dataloader.worker_init_fn = partial(_stand_apart, loader.worker_init_fn)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not self._training:  # what came before was preparation
            self._training = True
            self._start_clock()
        started = time.perf_counter()
        try:
            batches = super().get_batch_samples(*args, **kwargs)
        except (ConnectionError, EOFError) as error:  # a process ended while it handed a batch over
            time.sleep(_DEATH_IS_TOLD)  # if it was killed, the signal of that is an error from here
            raise RuntimeError("DataLoader worker exited unexpectedly") from error
        self._waited += time.perf_counter() - started
        return batches

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        return None  # the loss is a mean over the batch; the Trainer divides it by the accumulation steps

    def train_on(self, checkpoint: Path | None) -> bool:
        """Train to the end and save the model in the run directory; False if it was stopped before.

        Args:
            checkpoint: to go on from; what the log has of later steps is taken back.
        """
        self.run.rewind(-1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
        if checkpoint is None and self.evaluates_first:
            self.evaluate()
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finished = self.state.global_step >= self.args.max_steps
        if finished:
            harden(self.model)
            self.save_model(str(self.run.path))
        wait_for_all()  # for rank 0 to have written what is read next
        return finished

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            reason = _lost_process(error)
            if reason is None:
                raise
            raise RegrowError(f"{reason}; the run stopped after step {self.state.global_step}") from None
        finally:
            self._stop.restore()
            self._progress.close()

    def extra_state(self) -> dict[str, Any]:
        return {"sums": self.sums, "totals": self._totals()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.sums = {name: float(state["sums"][name]) for name in self._no_sums()}
        self._before |= state.get("totals", {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint) / JSON_FILE
            if wrong := _wrong_extra(load_json(path).get("extra"), set(self._no_sums())):
                raise damaged(path, wrong)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.lr_scheduler.last_epoch != self.state.global_step:
            raise damaged(path, f"scheduler.last_epoch is {self.lr_scheduler.last_epoch}")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        what = f"the checkpoint {self.run.checkpoints / f'checkpoint-{step}'}"
        try:
            with self.clock_stopped(), writing(what, f"the run stopped at step {step}; {GO_ON}"):
                super()._save_checkpoint(model, trial)
        except RegrowError:
            self.run.drop_partial()
            raise

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with writing(f"the model in {self.run.path}"):
            super().save_model(*args, **kwargs)

    def _log_updates(self, records: Sequence[UpdateRecord]) -> None:
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

    def _take_means(self) -> dict[str, float]:
        """What the log says of the steps since its last line; ``loss`` is the sum of the losses."""
        steps = max(self.sums["steps"], 1.0)
        means = {name: self.sums[name] / steps for name in self.losses}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = {"tokens_per_second": self._tokens / seconds, "data_wait": self._waited / seconds}
        self.sums = self._no_sums()
        self._before = self._totals()
        self._start_clock()
        return {"loss": sum(means.values()), **means, **speed}


def _wrong_extra(extra: Any, names: set[str]) -> str | None:
    """What of ``extra`` this trainer could not have written. Losses may be infinite where such steps are skipped."""
    if not isinstance(extra, dict):
        return "extra is missing"
    sums, totals = extra.get("sums"), extra.get("totals", {"tokens": 0, "seconds": 0.0})
    if not isinstance(sums, dict) or sums.keys() != names or any(type(x) is not float for x in sums.values()):
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
