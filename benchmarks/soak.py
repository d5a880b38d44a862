"""Train with a process SIGKILLed now and then, train the same undisturbed, and compare every bit.

    python benchmarks/soak.py runs/soak --every 90 -- --data corpus.txt --size mini --steps 20000 --save-steps 100

torchrun starts the processes anew after each kill and they go on from the newest checkpoint. What follows ``--`` goes
to ``regrow pretrain``. Exit status 0 says that weights, optimizer, topology and losses are bitwise those of the run
that nobody killed. Linux only: it looks for torchrun's children.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from regrow.bert.run import RunDirectory

CLOCKS = ("tokens_per_second", "data_wait", "seconds")
TENSORS = ("model.safetensors", "training_state.safetensors", "topology_state.safetensors")


def main() -> int:
    """Both runs and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder for both runs")
    parser.add_argument("--every", type=float, default=90.0, help="mean seconds between kills")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, flags = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    killed, whole = RunDirectory(asked.output / "killed"), RunDirectory(asked.output / "whole")
    seconds, kills = train(asked, flags, killed, random.Random(asked.seed))
    print(f"{kills} kills in {seconds / 60:.1f} minutes", flush=True)
    train(asked, flags, whole, None)
    different = compare(killed, whole)
    print("\n".join(different) or "bitwise equal to the undisturbed run: weights, optimizer, topology, losses")
    return 1 if different else 0


def train(
    asked: argparse.Namespace, flags: list[str], to: RunDirectory, dice: random.Random | None
) -> tuple[float, int]:
    """Run to the end; seconds, and how many were killed."""
    flags = [*flags, "--output", str(to.path)]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}", "--max-restarts=1000000"]
    asked.output.mkdir(parents=True, exist_ok=True)
    kills, start = 0, time.monotonic()
    with to.path.with_suffix(".log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", *torchrun, "-m", "regrow", "pretrain", *flags], stdout=log, stderr=log
        )
        try:
            while run.poll() is None:
                try:
                    run.wait(dice.expovariate(1 / asked.every) if dice else None)
                except subprocess.TimeoutExpired:
                    kills += kill_one(run, dice, to, time.monotonic() - start)
        finally:
            run.terminate()
            run.wait()
    if run.returncode:
        raise SystemExit(f"the run ended with status {run.returncode}; see {to.path.with_suffix('.log')}")
    return time.monotonic() - start, kills


def kill_one(run: subprocess.Popen, dice: random.Random, to: RunDirectory, seconds: float) -> bool:
    """SIGKILL one of torchrun's processes, if there are any now."""
    workers = psutil.Process(run.pid).children()
    if not workers:
        return False
    victim = dice.choice(workers)
    victim.send_signal(signal.SIGKILL)
    lines = to.read_metrics()
    step = lines[-1]["step"] if lines else 0
    print(f"{seconds:8.1f} s: killed process {victim.pid} after step {step} or later", flush=True)
    return True


def compare(killed: RunDirectory, whole: RunDirectory) -> list[str]:
    """What differs between the last checkpoints and logs of two runs."""
    different, last = [], whole.last_checkpoint().name
    for name in TENSORS:
        ours, expected = (load_file(run.checkpoints / last / name) for run in (killed, whole))
        if ours.keys() != expected.keys():
            different.append(f"{name}: other tensors")
        different += [
            f"{name}: {key}" for key in ours.keys() & expected.keys() if not torch.equal(ours[key], expected[key])
        ]
    if metrics(killed) != metrics(whole):
        different.append("metrics.jsonl")
    return different


def metrics(run: RunDirectory) -> list[dict]:
    """Lines of the log without what a clock says."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in run.read_metrics()]


if __name__ == "__main__":
    sys.exit(main())
