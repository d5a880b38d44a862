"""Carrying a study out: what is finished is skipped, what was interrupted goes on, what fails is reported."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tqdm.auto import tqdm

from regrow.errors import RegrowError
from regrow.study.pool import Handle, Job, LocalPool, Pool
from regrow.study.spec import RunSpec, Study
from regrow.study.worker import BUSY, DONE, INTERRUPTED, RunFolder

Status = Literal["finished", "skipped", "failed", "interrupted", "busy"]
TAIL = 15
"""Lines of its log that a failed run shows."""
_POLL = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of a run: ``skipped`` had a record already, ``busy`` is trained by another process."""

    id: str
    label: str
    status: Status
    message: str = ""


@dataclass(frozen=True)
class StudyResult:
    """What became of every run, in the study's order."""

    outcomes: tuple[Outcome, ...]

    @property
    def complete(self) -> bool:
        """Every run has a record."""
        return all(outcome.status in ("finished", "skipped") for outcome in self.outcomes)

    @property
    def interrupted(self) -> bool:
        """Somebody stopped it."""
        return any(outcome.status == "interrupted" for outcome in self.outcomes)

    def count(self, status: Status) -> int:
        """Runs of that status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    def __str__(self) -> str:
        names: tuple[Status, ...] = ("finished", "skipped", "failed", "interrupted", "busy")
        return ", ".join(f"{self.count(name)} {name}" for name in names if self.count(name)) or "no runs"


def run_study(
    study: Study,
    folder: str | Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    only: str | None = None,
    pool: Pool | None = None,
    keep_models: bool = False,
    keep_checkpoints: bool = False,
    progress: bool = True,
) -> StudyResult:
    """Train every run of a study that has no record in ``folder`` yet.

    Each run is a process of its own. The folder may be shared by several runners and several studies: a run belongs to
    whoever locks it first, and is never done twice. Ctrl-C lets every run in flight save a checkpoint and stop; a run
    that was killed loses no more than the steps since its last checkpoint.

    Args:
        study: which runs.
        folder: for records, logs and checkpoints; see :mod:`regrow.study.worker`.
        workers: runs at a time on this machine.
        threads: of each; by default the cores shared out.
        only: a glob for labels or ids, see :meth:`regrow.study.Study.only`.
        pool: where the processes run instead of here.
        keep_models, keep_checkpoints: of finished runs; they are deleted otherwise.
        progress: a live line for each run.

    Raises:
        RegrowError: the study cannot be run as it is. A run that fails is no exception but an outcome.
    """
    runs = study.runs() if only is None else study.only(only)
    labels = study.labels()
    pool = pool or LocalPool(workers)
    threads = threads or max(1, _cores() // workers)
    _check_folder(Path(folder))
    keep = [flag for flag, on in (("--keep-models", keep_models), ("--keep-checkpoints", keep_checkpoints)) if on]
    tickets = [_Ticket(run, labels[run.id], RunFolder(folder, run.id)) for run in runs]
    with _Display(len(tickets), progress) as display, _terminated_as_interrupted():
        try:
            for ticket in tickets:
                ticket.begin(pool, threads, keep)
                display.follow(ticket)
            while not all(ticket.outcome for ticket in tickets):
                time.sleep(_POLL)
                _look(tickets, display)
        except KeyboardInterrupt:
            _stop(tickets, display)
    return StudyResult(tuple(ticket.outcome for ticket in tickets if ticket.outcome))


class _Ticket:
    """A run on its way through the pool."""

    def __init__(self, run: RunSpec, label: str, folder: RunFolder) -> None:
        self.run, self.label, self.folder = run, label, folder
        self.handle: Handle | None = None
        self.outcome: Outcome | None = None
        self.log_start = 0

    def begin(self, pool: Pool, threads: int, keep: list[str]) -> None:
        if self.folder.record.exists():
            self._end("skipped")
            return
        self.folder.create(self.run)
        self.log_start = self.folder.log.stat().st_size if self.folder.log.exists() else 0
        command = (sys.executable, "-m", "regrow.study", str(self.folder.study.absolute()), self.run.id, *keep)
        self.handle = pool.submit(Job(self.run.id, command, self.folder.log.absolute(), threads))

    def look(self) -> None:
        """Notice an end."""
        if self.outcome or self.handle is None:
            return
        status = self.handle.status()
        if status is None:
            return
        if status == DONE and self.folder.record.exists():
            self._end("finished")
        elif status == BUSY:
            self._end("busy", "another process trains it")
        elif status in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            self._end("interrupted")
        else:
            self._end("failed", self._reason(status))

    def interrupt(self) -> None:
        if self.outcome is None and self.handle is not None:
            self.handle.interrupt()
        elif self.outcome is None:  # not submitted yet
            self._end("interrupted")

    def _end(self, status: Status, message: str = "") -> None:
        self.outcome = Outcome(self.run.id, self.label, status, message)

    def _reason(self, status: int) -> str:
        why = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            why += " (out of memory?)"
        tail: list[str] = []
        if self.folder.log.exists():
            with self.folder.log.open("rb") as log:
                log.seek(self.log_start)
                tail = log.read().decode(errors="replace").replace("\r", "\n").splitlines()[-TAIL:]
        return "\n".join([f"{why}; the end of {self.folder.log}:", *(f"    {line}" for line in tail)])


class _Display:
    """A line for the study, and a live one for each run in flight."""

    def __init__(self, total: int, shown: bool) -> None:
        self.shown = shown
        self.bar = tqdm(total=total, desc="study", unit="run", disable=not shown, dynamic_ncols=True, position=0)
        self.bars: dict[str, tqdm] = {}

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: Any) -> None:
        for bar in [*self.bars.values(), self.bar]:
            bar.close()

    def follow(self, ticket: _Ticket) -> None:
        """Bring a run's line up to date; at its end say how it went."""
        if ticket.outcome:
            bar = self.bars.pop(ticket.run.id, None)
            if bar is not None:
                bar.close()
            self.bar.update()
            if ticket.outcome.status != "skipped":
                self.say(f"{ticket.outcome.status}: {ticket.label} {ticket.outcome.message}".rstrip())
        elif self.shown and ticket.handle is not None and ticket.handle.running():
            bar = self.bars.get(ticket.run.id)
            if bar is None:
                taken = {-bar.pos for bar in self.bars.values()}
                place = next(i for i in range(1, len(taken) + 2) if i not in taken)
                bar = tqdm(
                    total=ticket.run.config.steps, desc=ticket.label, unit="step", dynamic_ncols=True, position=place,
                    leave=False,
                )  # fmt: skip
                self.bars[ticket.run.id] = bar
            step, loss = ticket.folder.step()
            if step != bar.n:
                bar.initial = bar.initial or step  # what an earlier process did says nothing of the speed
                bar.update(step - bar.n)
                if loss is not None:
                    bar.set_postfix(mlm=f"{loss:.3f}")

    def say(self, text: str) -> None:
        """A line that stays, above the live ones."""
        if self.shown:
            self.bar.write(text, file=sys.stderr)


def _look(tickets: list[_Ticket], display: _Display) -> None:
    for ticket in tickets:
        if ticket.outcome is None:
            ticket.look()
            display.follow(ticket)


def _stop(tickets: list[_Ticket], display: _Display) -> None:
    """Let runs save a checkpoint; a second interruption lets them not."""
    display.say("stopping; runs in flight save a checkpoint (Ctrl-C again: they do not)")
    while not all(ticket.outcome for ticket in tickets):
        try:
            for ticket in tickets:
                ticket.interrupt()
            while not all(ticket.outcome for ticket in tickets):
                _look(tickets, display)
                time.sleep(_POLL)
        except KeyboardInterrupt:
            continue


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does; only the main thread of a program may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegrowError(f"cannot use the study folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < 2**20:
        raise RegrowError(f"cannot write to the study folder {folder}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
