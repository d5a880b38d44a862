"""Where the processes of a study run: on this machine, or on a cluster through submitit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from regrow.errors import RegrowError


@dataclass(frozen=True)
class Job:
    """A process to be run: its command, what it adds to the environment, and where its output goes."""

    name: str
    command: tuple[str, ...]
    log: Path
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the number of threads; libraries read it when they are loaded."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        # No bars in the log, and no forks of busy tokenizers.
        return {**os.environ, **threads, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Handle(Protocol):
    """A submitted job."""

    def status(self) -> int | None:
        """Its exit status, negative for the signal that killed it; ``None`` while it waits or runs."""

    def running(self) -> bool:
        """Whether its process has begun and not ended, as far as is known."""

    def interrupt(self) -> None:
        """Ask it to save a checkpoint and stop; one that has not begun never does. A second time: at once."""


class Pool(Protocol):
    """Runs jobs, so many at a time; the same interface for any engine."""

    def submit(self, job: Job) -> Handle:
        """Take a job; it begins when there is room."""


class LocalPool:
    """Processes on this machine, at most ``workers`` at a time.

    Nothing runs in the background here: a waiting job begins when :meth:`Handle.status` of any is asked.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise RegrowError(f"workers must be at least 1, got {workers}")
        self.workers, self.handles = workers, list[_LocalHandle]()

    def submit(self, job: Job) -> Handle:
        handle = _LocalHandle(job, self)
        self.handles.append(handle)
        self._fill()
        return handle

    def _fill(self) -> None:
        room = self.workers - sum(handle.running() for handle in self.handles)
        waiting = [handle for handle in self.handles if handle.process is None and not handle.cancelled]
        for handle in waiting[: max(room, 0)]:
            handle.start()


class _LocalHandle:
    def __init__(self, job: Job, pool: LocalPool) -> None:
        self.job, self.pool = job, pool
        self.process: subprocess.Popen[bytes] | None = None
        self.cancelled = False

    def start(self) -> None:
        with self.job.log.open("ab") as log:
            # In a session of its own: a terminal's Ctrl-C reaches the runner alone, which then asks each job once.
            self.process = subprocess.Popen(
                self.job.command,
                env=self.job.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def status(self) -> int | None:
        if self.process is None:
            self.pool._fill()
        if self.process is None:
            return -signal.SIGINT if self.cancelled else None
        return self.process.poll()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def interrupt(self) -> None:
        self.cancelled = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)


class SubmititPool:
    """Jobs of a cluster through `submitit <https://github.com/facebookincubator/submitit>`_ (extra ``cluster``).

    Args:
        folder: for submitit's own files, shared with the nodes.
        cluster: ``slurm``, or ``local`` and ``debug`` to try a study out on this machine.
        options: of submitit's executor, as ``slurm_partition``, ``timeout_min``, ``slurm_array_parallelism``.

    Raises:
        RegrowError: submitit is not installed.
    """

    def __init__(self, folder: str | Path, cluster: str = "slurm", options: Mapping[str, Any] | None = None) -> None:
        try:
            import submitit
        except ImportError:
            raise RegrowError('submitit is not installed: run pip install "regrow[cluster]"') from None
        self.executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
        self.options = {"timeout_min": 24 * 60} | dict(options or {})

    def submit(self, job: Job) -> Handle:
        self.executor.update_parameters(name=f"regrow-{job.name}", cpus_per_task=job.threads, **self.options)
        return _SubmititHandle(self.executor.submit(ClusterTask(job)))


class _SubmititHandle:
    def __init__(self, job: Any) -> None:
        self.job = job

    def status(self) -> int | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        if error is not None:
            return -signal.SIGINT if self.job.state.startswith("CANCEL") else 1
        return self.job.result()

    def running(self) -> bool:
        return self.job.state == "RUNNING"

    def interrupt(self) -> None:
        self.job.cancel()


class ClusterTask:
    """What a node executes: the job's own command, so that a node's memory, threads and crash are the job's alone.

    Before the time is up, or when the job is preempted, submitit calls :meth:`checkpoint`; the job is then queued
    again and continues from there.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        with self.job.log.open("ab") as log:
            self.process = subprocess.Popen(self.job.command, env=self.job.environment, stdout=log, stderr=log)
            return self.process.wait()

    def checkpoint(self) -> Any:
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(ClusterTask(self.job))
