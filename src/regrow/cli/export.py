"""``regrow export``: a trained model for other programs, or several models in one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from regrow.cli.parser import OneLineParser, run_subcommand

_MODEL = "directory of a run or a saved model (the newest checkpoint, if the run is not finished)"


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow export",
        description="Write a trained model for programs without regrow, or average several models.",
        epilog="each teaches its options: regrow export onnx --help",
    )
    summary = "dense: an ordinary transformers directory; onnx: a file for onnxruntime; soup: the average of models"
    return run_subcommand(parser, argv, {"dense": _dense, "onnx": _onnx, "soup": _soup}, summary)


def _dense(argv: Sequence[str]) -> int:
    from regrow.bert.export import export_dense

    parser = OneLineParser(
        prog="regrow export dense",
        description="Write an ordinary transformers directory, tokenizer included, that loads without regrow. Absent "
        "weights become zeros. What was written is read back and compared with the sparse model.",
        epilog="example: regrow export dense runs/small exported/small",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    asked = parser.parse_args(argv)
    print(export_dense(asked.model, asked.out))
    return 0


def _onnx(argv: Sequence[str]) -> int:
    from regrow.bert.onnx import OPSETS, export_onnx
    from regrow.bert.saved import load_saved

    parser = OneLineParser(
        prog="regrow export onnx",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Write an ONNX file with dynamic batch and length (needs regrow[onnx]). onnxruntime runs it on "
        "batches of several shapes, and the file is kept only if its outputs are the model's.",
        epilog="example: regrow export onnx runs/small small.onnx --weights blocks",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("out", type=Path, metavar="OUT.onnx", help="file to make")
    what = "dense: ordinary products, absent weights 0; blocks: existing blocks only, in a file as small as the model"
    parser.add_argument("--weights", choices=("dense", "blocks"), default="dense", help=what)
    parser.add_argument("--opset", type=int, default=20, help=f"version of the operators, {OPSETS[0]} to {OPSETS[-1]}")
    asked = parser.parse_args(argv)
    print(export_onnx(load_saved(asked.model), asked.out, weights=asked.weights, opset=asked.opset, progress=True))
    return 0


def _soup(argv: Sequence[str]) -> int:
    from regrow.bert.soup import save_soup

    parser = OneLineParser(
        prog="regrow export soup",
        description="Average models with identical sparsity patterns, such as one model fine-tuned several times with "
        "a static pattern, into one as sparse and as fast as each (Wortsman et al. 2022, Zimmer et al. 2024).",
        epilog="example: regrow export soup soups/three runs/seed0 runs/seed1 runs/seed2 --greedy",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("models", nargs="+", metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "--greedy",
        action="store_true",
        help="average only models that help: from the best on, each stays if the held-out loss, or the main metric of "
        "the task, does not get worse; as the first model's run evaluates it",
    )
    asked = parser.parse_args(argv)
    score = None
    if asked.greedy:
        from regrow.cli.evaluate import scorer

        score = scorer(asked.models[0])
    chosen = save_soup(asked.models, asked.out, score=score, progress=True)
    print(f"{asked.out}: the average of {len(chosen)} models")
    if asked.greedy:
        print(f"best first: {', '.join(asked.models[number] for number in chosen)}")
    return 0
