"""Fine-tune several encoders on several tasks with several seeds, and make a table of it.

    python benchmarks/downstream.py runs/downstream --data glue \\
        --models sparse=runs/small,narrow=runs/narrow,dense=runs/dense --tasks sst2,cola,mrpc,rte,stsb --seeds 3

Each model has the best of the learning rates that ``--rates`` names, by a training of its own on the last of the tasks.

``--data`` holds a folder for each task, named as GLUE's are. Every run is one of ``regrow finetune`` in a folder of its
own, so what is finished is not repeated, and Ctrl-C loses nothing. After ``--`` come more flags for that command.
``--table`` writes the table as Markdown, with a row for each model: mean and standard deviation over seeds of the
task's main metric, times 100, and seconds of a training.

Those seconds compare models only if every training had the machine to itself. ``--clock 40`` measures them afterwards,
on an idle machine: after all is trained, 40 steps of every model on a task, model after model, three times over; the
table then has the median of a step times the steps of a training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median, stdev

from regrow.bert.finetune import finetune, last_evaluation
from regrow.bert.run import RunDirectory
from regrow.bert.tasks.task import GLUE
from regrow.cli.finetune import COMMAND
from regrow.cli.parser import list_of

_REPEATS, _RATE_SEED = 3, 100
FOLDERS = {"sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B", "qnli": "QNLI"}


def main() -> int:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for all runs")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--models", type=list_of(str), required=True, metavar="NAME=PATH,...", help="what to compare")
    parser.add_argument("--tasks", type=list_of(str), default=list(FOLDERS)[:5], help="of GLUE")
    parser.add_argument("--seeds", type=int, default=3, help="of each")
    parser.add_argument("--epochs", type=list_of(str), default=["4", "sst2=1"], help="of all tasks, and of single ones")
    parser.add_argument("--rates", type=list_of(str), default=["1e-4", "3e-4"], help="learning rates to choose from")
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument("--clock", type=int, metavar="STEPS", help="measure seconds anew, by so many steps of each")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, flags = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    models = dict(pair.split("=", 1) for pair in asked.models)
    epochs = dict.fromkeys(asked.tasks, asked.epochs[0]) | dict(pair.split("=") for pair in asked.epochs[1:])
    rates = {}
    for name in models:
        rates[name] = best_rate(asked, name, models[name], epochs, flags)
        if rates[name] is None:
            return 130
    todo = [
        (seed, task, name) for seed in range(asked.seeds) for task in asked.tasks for name in models
    ]  # seed by seed: a table of fewer seeds comes first
    for number, (seed, task, name) in enumerate(todo, start=1):
        print(f"run {number} of {len(todo)}: {name} on {task}, seed {seed}", file=sys.stderr)
        own = [f"--model={models[name]}", *of_task(asked, task, epochs), f"--learning-rate={rates[name]}"]
        if not train([*own, f"--seed={seed}", *flags], folder(asked, name, task, seed)):
            return 130
    if asked.clock is not None:
        for task in asked.tasks:
            task_flags = [f"--task={task}", f"--data={asked.data / FOLDERS[task]}", *flags]
            clock(asked, models, task, float(epochs[task]), task_flags)
    text = table(asked, rates)
    print(text)
    if asked.table is not None:
        asked.table.write_text(text + "\n")
    return 0


def best_rate(asked: argparse.Namespace, name: str, model: str, epochs: dict[str, str], flags: list[str]) -> str | None:
    """The learning rate with the best result on the last task, with a seed of its own; None if that was interrupted."""
    task, found = asked.tasks[-1], {}
    if len(asked.rates) == 1:
        return asked.rates[0]
    for rate in asked.rates:
        print(f"{name} on {task} at {rate}", file=sys.stderr)
        to = folder(asked, name, task, f"rate-{rate}")
        own = [f"--model={model}", *of_task(asked, task, epochs), f"--learning-rate={rate}", f"--seed={_RATE_SEED}"]
        if not train([*own, *flags], to):
            return None
        found[rate] = score(to, task)
    best = max(asked.rates, key=lambda rate: found[rate])
    print(f"{name}: {found}, so {best}", file=sys.stderr)
    return best


def of_task(asked: argparse.Namespace, task: str, epochs: dict[str, str]) -> list[str]:
    return [f"--task={task}", f"--data={asked.data / FOLDERS[task]}", f"--epochs={epochs[task]}"]


def score(to: Path, task: str) -> float:
    """The task's main metric at the end of a run."""
    run = RunDirectory(to)
    found, _ = last_evaluation(run, run.read_metrics()[-1]["step"])
    return (found or {})[GLUE[task].metrics[0]]


def folder(asked: argparse.Namespace, name: str, task: str, seed: int | str) -> Path:
    """Of one run."""
    return asked.output / f"{name}-{task}-{seed}"


def train(flags: list[str], to: Path) -> bool:
    """Run one fine-tuning to its end, or go on with it; whether it ended."""
    if (to / "config.json").exists():
        return True
    resume = ["--resume"] if RunDirectory(to).begun else []
    config, method, resumes = COMMAND.parse([*flags, f"--output={to}", *resume])
    return finetune(config, method, resume=resumes).finished


def clock(asked: argparse.Namespace, models: dict[str, str], task: str, epochs: float, flags: list[str]) -> None:
    """Time a few steps of every model, in turns, and keep what a whole training takes by them."""
    steps = {name: RunDirectory(folder(asked, name, task, 0)).read_metrics()[-1]["step"] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(_REPEATS):
        for name, model in models.items():
            share = epochs * asked.clock / steps[name]
            with tempfile.TemporaryDirectory() as aside:
                train([f"--model={model}", f"--epochs={share}", *flags], Path(aside) / "run")
                last = RunDirectory(Path(aside) / "run").read_metrics()[-1]
            seconds[name].append(last["seconds"] / last["step"])
            took = 1e3 * seconds[name][-1]
            print(f"{task}, {name}, {repeat + 1} of {_REPEATS}: {took:.1f} ms a step", file=sys.stderr)
    for name in models:
        (asked.output / f"clock-{name}-{task}.json").write_text(json.dumps(median(seconds[name]) * steps[name]))


def table(asked: argparse.Namespace, rates: dict[str, str]) -> str:
    """Rows of models with their learning rates, columns of tasks."""
    metrics = [GLUE[task].metrics[0] for task in asked.tasks]
    titles = [f"{FOLDERS[task]} ({metric})" for task, metric in zip(asked.tasks, metrics, strict=True)]
    lines = [f"| model | {' | '.join(titles)} | mean |", "|---" * (len(titles) + 2) + "|"]
    for name, rate in rates.items():
        cells, means = [], []
        for task, metric in zip(asked.tasks, metrics, strict=True):
            values, seconds = [], []
            for seed in range(asked.seeds):
                run = RunDirectory(folder(asked, name, task, seed))
                found, took = last_evaluation(run, run.read_metrics()[-1]["step"])
                values.append(100 * (found or {})[metric])
                measured = asked.output / f"clock-{name}-{task}.json"
                seconds.append(json.loads(measured.read_text()) if measured.exists() else took)
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.1f}{spread}, {fmean(seconds):.0f} s")
            means.append(fmean(values))
        lines.append(f"| {name} ({rate}) | {' | '.join(cells)} | {fmean(means):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
