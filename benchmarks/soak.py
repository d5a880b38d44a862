"""Train with a process SIGKILLed now and then, train the same undisturbed, and compare every bit.

    python benchmarks/soak.py runs/soak --every 90 -- --data corpus.txt --size mini --steps 20000 --save-steps 100

torchrun starts the processes anew after each kill and they go on from the newest checkpoint. What follows ``--`` goes
to ``regrow pretrain``. Exit status 0 says that weights, optimizer, topology and losses are bitwise those of the run
that nobody killed. Linux only: it looks for torchrun's children.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

CLOCKS = ("tokens_per_second", "data_wait", "seconds")
TENSORS = ("model.safetensors", "training_state.safetensors", "topology_state.safetensors")


def main() -> int:
    """Both runs and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder for both runs")
    parser.add_argument("--every", type=float, default=90.0, help="mean seconds between kills")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("flags", nargs="*", help="of regrow pretrain, after --")
    asked = parser.parse_args()
    killed, whole = asked.output / "killed", asked.output / "whole"
    seconds, kills = train(asked, killed, random.Random(asked.seed))
    print(f"{kills} kills in {seconds / 60:.1f} minutes", flush=True)
    train(asked, whole, None)
    different = compare(killed, whole)
    print("\n".join(different) or "bitwise equal to the undisturbed run: weights, optimizer, topology, losses")
    return 1 if different else 0


def train(asked: argparse.Namespace, folder: Path, dice: random.Random | None) -> tuple[float, int]:
    """Run to the end; seconds, and how many were killed."""
    flags = [*asked.flags, "--output", str(folder)]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}", "--max-restarts=1000000"]
    asked.output.mkdir(parents=True, exist_ok=True)
    kills, start = 0, time.monotonic()
    with (asked.output / f"{folder.name}.log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", *torchrun, "-m", "regrow", "pretrain", *flags], stdout=log, stderr=log
        )
        try:
            while run.poll() is None:
                try:
                    run.wait(dice.expovariate(1 / asked.every) if dice else None)
                except subprocess.TimeoutExpired:
                    kills += kill_one(run, dice, folder, time.monotonic() - start)
        finally:
            run.terminate()
            run.wait()
    if run.returncode:
        raise SystemExit(f"the run ended with status {run.returncode}; see {asked.output / folder.name}.log")
    return time.monotonic() - start, kills


def kill_one(run: subprocess.Popen, dice: random.Random, folder: Path, seconds: float) -> bool:
    """SIGKILL one of torchrun's processes, if there are any now."""
    workers = psutil.Process(run.pid).children()
    if not workers:
        return False
    victim = dice.choice(workers)
    victim.send_signal(signal.SIGKILL)
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    step = json.loads(lines[-1])["step"] if lines else 0
    print(f"{seconds:8.1f} s: killed process {victim.pid} after step {step} or later", flush=True)
    return True


def compare(killed: Path, whole: Path) -> list[str]:
    """What differs between the last checkpoints and logs of two runs."""
    different = []
    last = max((path.name for path in (whole / "checkpoints").iterdir()), key=lambda name: int(name.rpartition("-")[2]))
    for name in TENSORS:
        ours, expected = (load_file(run / "checkpoints" / last / name) for run in (killed, whole))
        if ours.keys() != expected.keys():
            different.append(f"{name}: other tensors")
        different += [
            f"{name}: {key}" for key in ours.keys() & expected.keys() if not torch.equal(ours[key], expected[key])
        ]
    if metrics(killed) != metrics(whole):
        different.append("metrics.jsonl")
    return different


def metrics(run: Path) -> list[dict]:
    """Lines of the log without what a clock says."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
