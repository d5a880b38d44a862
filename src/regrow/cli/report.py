"""``regrow report``: one page of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regrow.cli.parser import OneLineParser
from regrow.study.report import write_claims, write_report
from regrow.study.runs import read_runs


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow report",
        description="Write one self-contained HTML page about finished runs: loss curves, Pareto fronts in FLOPs and "
        "in seconds, how the patterns moved, what the runs say about each claim of the paper, and a table of all runs.",
        epilog="example: regrow report runs/first-study --output report.html --figures figures",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="record files, or folders that hold some")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
    parser.add_argument("--title", default="Runs", help="heading of the page")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also PNG and SVG pictures (needs regrow[plot])")
    parser.add_argument("--claims", type=Path, metavar="FILE", help="also the paper's claims as a Markdown page")
    asked = parser.parse_args(argv)
    found, broken = read_runs(asked.runs)
    print(f"{len(found)} runs: {write_report(found, asked.output, title=asked.title, notes=broken)}")
    if asked.claims is not None:
        print(write_claims(found, asked.claims))
    if asked.figures is not None:
        from regrow.study.figures import write_figures

        for path in write_figures(found, asked.figures):
            print(path)
    return 0
