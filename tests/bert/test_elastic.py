"""A process that is killed takes the others with it; torchrun starts all anew, and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pretraining import config, metrics_without_clock, write_corpus
from processes import together
from regrow.bert.pretrain import PretrainConfig, pretrain
from regrow.methods import create

STEPS = {"steps": 120, "n_updates": 20, "save_steps": 10, "eval_steps": 40}


def killed_twice(settings: PretrainConfig, log: Path) -> int:
    """Train with two processes under torchrun and SIGKILL one of them twice; torchrun's exit status."""
    flags = [f"--{name}={value}" for name, value in asdict(settings).items() if value is not None]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    with log.open("w") as out:
        run = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "regrow", "pretrain", *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
        try:
            checkpoints = Path(settings.output) / "checkpoints"
            first = kill_one(run, 0, checkpoints.exists)
            second = kill_one(run, 1, (checkpoints / "checkpoint-20").exists)
            assert first and second, "the run ended before it was killed"
            return run.wait(timeout=120)
        finally:
            run.terminate()  # and its children with it
            run.wait()


def kill_one(run: subprocess.Popen, which: int, when: Callable[[], bool]) -> bool:
    """SIGKILL one of torchrun's workers once something is there; whether there was one."""
    until = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < until:
        workers = sorted(psutil.Process(run.pid).children(), key=lambda process: process.pid)
        if when() and len(workers) == 2:
            workers[which].send_signal(signal.SIGKILL)
            return True
        time.sleep(0.01)
    return False


def unkilled(corpus: Path, folder: Path) -> None:
    pretrain(config(corpus, folder, **STEPS), create("dynsparse"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for torchrun's children")
def test_a_killed_process_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
    corpus = write_corpus(tmp_path / "made-up.txt")
    status = killed_twice(config(corpus, tmp_path / "killed", **STEPS), tmp_path / "log.txt")
    log = (tmp_path / "log.txt").read_text()
    assert status == 0, log
    assert "has no checkpoint yet: it begins anew" in log
    together(2, f"{__file__}:unkilled", tmp_path / "ranks", corpus, tmp_path / "whole")
    for name in ("model.safetensors", "training_state.safetensors", "topology_state.safetensors"):
        ours, whole = (load_file(tmp_path / run / "checkpoints/checkpoint-120" / name) for run in ("killed", "whole"))
        assert ours.keys() == whole.keys()
        for key in ours:
            assert torch.equal(ours[key], whole[key]), f"{name}: {key}"
    assert metrics_without_clock(tmp_path / "killed") == metrics_without_clock(tmp_path / "whole")
