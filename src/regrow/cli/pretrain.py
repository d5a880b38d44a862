"""``regrow pretrain``: pre-train a sparse BERT on text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from regrow.bert.pretrain import PretrainConfig, PretrainResult, pretrain
from regrow.bert.run import RunDirectory
from regrow.cli.parser import INTERRUPTED, OneLineParser
from regrow.cli.sources import add_sources, flags_of_files, read_sources, refuse_changes, saved_flags, value_of
from regrow.methods import method_class
from regrow.ranks import leave, rank, restarts


def run(argv: Sequence[str]) -> int:
    asked, rest = read_sources(argv)
    given = rest if asked.resume else [*flags_of_files(asked), *rest]
    run = RunDirectory(value_of("--output", given, default=PretrainConfig.output))
    resume = asked.resume or (restarts() > 0 and run.begun)  # torchrun repeats the command as it was
    saved = saved_flags(run) if resume else []
    flags = [*saved, *given]
    parser = _parser(method_class(value_of("--method", flags, default="dynsparse")))
    config, method = _parse(parser, flags)
    if resume:
        refuse_changes((config, method), _parse(parser, saved))
    result = pretrain(config, method, resume=resume)
    if rank() == 0:
        print(_describe(result))
    leave()
    return 0 if result.finished else INTERRUPTED


def _parser(method: type) -> Any:
    """Flags from the fields of the configuration and of the method."""
    parser_class: Any = type("PretrainParser", (OneLineParser, HfArgumentParser), {})
    parser = parser_class(
        PretrainConfig,
        prog="regrow pretrain",
        usage="regrow pretrain [--FLAG VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Pre-train a BERT (masked words and next sentences) whose encoder is always sparse. Every flag can "
        "also stand in a YAML file given with --config.",
        epilog="example: regrow pretrain --data corpus.txt --size tiny --density 0.1 --block-size 16 --steps 200 "
        "--output runs/first",
    )
    add_sources(parser)
    if fields(method):
        method._argument_group_name = f"options of --method {method.name}"  # type: ignore[attr-defined]
    parser._add_dataclass_arguments(method)
    parser.dataclass_types.append(method)
    return parser


def _parse(parser: Any, argv: Sequence[str]) -> tuple[Any, Any]:
    """Configuration and method; the third result of the parser is the source flags, taken out before."""
    parser.parse_args(argv)  # unknown flags end here, in one line
    config, method = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:2]
    return config, method


def _describe(result: PretrainResult) -> str:
    """What a user wants to know at the end, in a few lines."""
    if not result.finished:
        return (
            f"stopped after step {result.step}; a checkpoint is saved\n"
            f"continue with: regrow pretrain --output {result.path} --resume"
        )
    rows = []
    for name, title in (("mlm", "held-out MLM loss"), ("nsp", "held-out NSP loss")):
        before, after = ((e or {}).get(f"eval_{name}_loss", float("nan")) for e in (result.before, result.after))
        rows.append((title, f"{before:.4f} -> {after:.4f} nats ({after - before:+.4f})"))
    rows.append(("encoder density", f"{result.density:.4g}"))
    if result.coverage is not None:
        rows.append(("explored coverage", f"{result.coverage:.4f} of all block positions were active at some time"))
    share = result.stored_bytes / result.dense_bytes
    size = f"{result.stored_bytes:,} against {result.dense_bytes:,} dense ({share:.1%}, embeddings included)"
    rows.append(("stored bytes", size))
    rows.append(("saved model", str(result.path)))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:{width}}  {text}" for title, text in rows)
