"""One run of a study in a process of its own: ``python -m regrow.study FOLDER ID``.

A study's folder holds

=====================  ================================================================================
``records/ID.json``    the finished runs (:class:`regrow.study.RunRecord`)
``runs/ID/spec.json``  what the run is
``runs/ID/log.txt``    what its process printed
``runs/ID/run/``       its run directory (:mod:`regrow.bert.run`)
``runs/ID/lock``       locked while a process trains it
=====================  ================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from regrow.allocator import keep_freed_memory
from regrow.bert.pretrain import prepare, pretrain
from regrow.bert.run import METRICS_FILE, RunDirectory
from regrow.errors import RegrowError
from regrow.kernels.machine import describe_machine
from regrow.study.patterns import PatternSnapshots
from regrow.study.record import RunRecord, paper_flops, read_json, summarise, versions, write_json
from regrow.study.spec import RunSpec

DONE, FAILED, BUSY, INTERRUPTED = 0, 2, 75, 130
"""Exit statuses; 75 says that another process has the run."""
_TAIL_BYTES = 4096


class RunFolder:
    """The files of one run within the folder of a study."""

    def __init__(self, folder: str | Path, run_id: str) -> None:
        self.id, self.study = run_id, Path(folder)
        self.path = self.study / "runs" / run_id
        self.record = self.study / "records" / f"{run_id}.json"
        self.spec, self.log, self.run = self.path / "spec.json", self.path / "log.txt", self.path / "run"
        self.lock = FileLock(self.path / "lock")

    def create(self, spec: RunSpec) -> None:
        """Make the folder and write what the run is."""
        write_json(self.spec, dict(spec.options))

    def step(self) -> tuple[int, float | None]:
        """How far the run has come by the end of its log, and its last training loss."""
        step, loss = 0, None
        for line in self._last_lines():
            step, loss = line["step"], line.get("mlm_loss", loss)
        return step, loss

    def _last_lines(self) -> Iterator[dict[str, Any]]:
        path = self.run / METRICS_FILE
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            for text in file:
                try:
                    yield {"step": 0} | json.loads(text)
                except (ValueError, TypeError):  # begun before the tail, or not yet written to its end
                    continue


def train(folder: RunFolder, *, keep_models: bool = False, keep_checkpoints: bool = False) -> int:
    """Begin or continue a run and write its record; returns one of the exit statuses.

    Raises:
        RegrowError: the run cannot be trained.
    """
    with folder.lock.acquire(timeout=0):
        if folder.record.exists():  # another process was faster
            return DONE
        spec = RunSpec(read_json(folder.spec))
        if spec.id != folder.id:
            raise RegrowError(f"{folder.spec} is now run {spec.id}: its corpus or tokenizer has changed since")
        config = replace(spec.config, output=str(folder.run))
        with FileLock(folder.study / "prepare.lock"):  # the first run prepares the data, the others find them
            prepare(config)
        run = RunDirectory(folder.run)
        resume = any(run.checkpoints.glob("checkpoint-*"))
        if not resume:  # killed before the first checkpoint: nothing to keep
            shutil.rmtree(folder.run, ignore_errors=True)
        patterns = folder.path / "patterns.json"
        snapshots = PatternSnapshots(patterns, config.schedule, moves=spec.method.moves and not config.dense)
        result = pretrain(config, spec.method, layer=spec.layer, resume=resume, callbacks=[snapshots])
        if not result.finished:
            return INTERRUPTED
        RunRecord(
            id=spec.id,
            spec=dict(spec.options),
            config=spec.full,
            machine=describe_machine(),
            versions=versions(),
            flops=paper_flops(config, spec.layer),
            memory={"peak_rss": peak_memory()},
            patterns={} if config.dense else read_json(patterns),
            **summarise(run),
        ).save(folder.record)
        tidy(run, keep_models=keep_models, keep_checkpoints=keep_checkpoints)
    return DONE


def tidy(run: RunDirectory, *, keep_models: bool = False, keep_checkpoints: bool = False) -> None:
    """Delete what a finished run no longer needs: its checkpoints and its model. Logs stay."""
    if not keep_checkpoints:
        for checkpoint in run.checkpoints.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    if not keep_models:
        for file in run.path.iterdir():
            if file.is_file() and file.suffix not in (".jsonl", ".yaml"):
                file.unlink()


def peak_memory() -> int:
    """Most bytes this process ever had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """The process of one run."""
    parser = argparse.ArgumentParser(prog="python -m regrow.study")
    parser.add_argument("folder", type=Path)
    parser.add_argument("id")
    parser.add_argument("--keep-models", action="store_true")
    parser.add_argument("--keep-checkpoints", action="store_true")
    asked = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it otherwise
    _stop_with_parent()
    keep_freed_memory()
    try:
        return train(
            RunFolder(asked.folder, asked.id), keep_models=asked.keep_models, keep_checkpoints=asked.keep_checkpoints
        )
    except Timeout:
        return BUSY
    except RegrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _stop_with_parent() -> None:
    """A run whose runner was killed saves a checkpoint and stops: nothing trains that nobody sees."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
