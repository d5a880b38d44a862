"""``regrow study``: train many runs that together answer a question."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regrow.cli.parser import INCOMPLETE, INTERRUPTED, OneLineParser, run_subcommand
from regrow.errors import RegrowError


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow study",
        description="Train the runs of a study: each once, whatever stops in between, with a record of everything.",
        epilog="each teaches its options: regrow study run --help",
    )
    summary = "list: the studies that come with regrow; show, run: one; fit: a scaling law to finished runs"
    return run_subcommand(parser, argv, {"list": _list, "show": _show, "run": _run, "fit": _fit}, summary)


def _list(argv: Sequence[str]) -> int:
    from regrow.study.presets import listing

    OneLineParser(prog="regrow study list", description="The studies that come with regrow.").parse_args(argv)
    print(listing())
    return 0


def _show(argv: Sequence[str]) -> int:
    from regrow.study.presets import describe

    parser = OneLineParser(prog="regrow study show", description="The runs of a study: id, size, cost, name.")
    _add_study(parser)
    print(describe(_asked_study(parser.parse_args(argv))))
    return 0


def _run(argv: Sequence[str]) -> int:
    from regrow.study import run_study
    from regrow.study.pool import SubmititPool
    from regrow.study.presets import describe

    parser = OneLineParser(
        prog="regrow study run",
        description="Train every run that has no record in the folder yet. Ctrl-C lets runs save a checkpoint; the "
        "same command goes on from there.",
        epilog="example: regrow study run c5 --scale cpu --workers 2 --only 'norm=l1,*'",
    )
    _add_study(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"), help="for records, logs and checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of each run; by default the cores shared out")
    parser.add_argument("--only", metavar="GLOB", help="runs whose name or id matches; see regrow study show")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and stop")
    parser.add_argument("--keep-models", action="store_true", help="of finished runs")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], help="through submitit (regrow[cluster])")
    parser.add_argument(
        "--cluster-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of submitit, as slurm_partition=gpu",
    )
    asked = parser.parse_args(argv)
    study = _asked_study(asked)
    if asked.dry_run:
        done = [path.stem for path in asked.folder.glob("records/*.json")]
        print(describe(study, study.only(asked.only) if asked.only else None, done))
        return 0
    pool = None
    if asked.cluster is not None:
        pool = SubmititPool(asked.folder / "submitit", asked.cluster, _assignments(asked.cluster_option))
    result = run_study(
        study,
        asked.folder,
        workers=asked.workers,
        threads=asked.threads,
        only=asked.only,
        pool=pool,
        keep_models=asked.keep_models,
        keep_checkpoints=asked.keep_checkpoints,
    )
    print(result)
    return 0 if result.complete else INTERRUPTED if result.interrupted else INCOMPLETE


def _fit(argv: Sequence[str]) -> int:
    from tqdm.auto import tqdm

    from regrow.bert.output import check_new
    from regrow.study.law_points import describe_fit, fit_points, law_points, write_points
    from regrow.study.runs import read_runs

    parser = OneLineParser(
        prog="regrow study fit",
        description="Fit the law of the loss with mean parameters and tokens, L = E + A / N^alpha + B / D^beta, to "
        "finished runs, sparse and dense. N counts the encoder's active linear weights, on the mean over training. Of "
        "runs that differ in their learning rate alone those of the best one count.",
        epilog="example: regrow study fit runs/studies --csv points.csv",
    )
    parser.add_argument("runs", nargs="+", metavar="STUDY", help="folders of studies, or record files")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the points and what the law gives to each")
    parser.add_argument(
        "--resamples", type=int, default=200, help="of the bootstrap that gives the intervals; 0 is none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    asked = parser.parse_args(argv)
    if asked.resamples < 0 or asked.seed < 0:
        parser.error("--resamples and --seed must not be negative")
    if asked.csv is not None:
        check_new(asked.csv)
    runs, broken = read_runs(asked.runs)
    points, left_out = law_points(runs)

    def watch(resamples: range) -> Iterable[int]:
        return tqdm(resamples, "resamples", leave=False, disable=None)

    for line in [*broken, *left_out]:
        print(f"left out: {line}")
    fit = fit_points(points, resamples=asked.resamples, seed=asked.seed, watch=watch)
    print(describe_fit(fit, points))
    if asked.csv is not None:
        write_points(points, fit.law, asked.csv)
    return 0


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="STUDY", help="a name from regrow study list, or a .yaml file")
    parser.add_argument("--scale", help="cpu, gpu or paper, or one of the file's own; by default its first")
    parser.add_argument("--data", help="corpus of every run, as for regrow pretrain")
    parser.add_argument("--tokenizer", help="tokenizer of every run, as for regrow pretrain")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other option of every run, as steps=100"
    )


def _asked_study(asked: argparse.Namespace) -> Any:
    from regrow.study import load_study

    options = {name: getattr(asked, name) for name in ("data", "tokenizer") if getattr(asked, name) is not None}
    options |= _assignments(asked.set)
    return load_study(asked.name, asked.scale).with_options(**options)


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as YAML reads the value."""
    import yaml

    values = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise RegrowError(f"{text!r} must be NAME=VALUE")
        values[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return values
