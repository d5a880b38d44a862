"""The flags of a training: fields of its configuration and of the method, also from a file or the run to resume."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import HfArgumentParser

from regrow.bert.run import RunDirectory
from regrow.cli.parser import OneLineParser
from regrow.cli.sources import add_sources, flags_of_files, read_sources, refuse_changes, saved_flags, value_of
from regrow.methods import method_class
from regrow.nn.options import layer_class
from regrow.ranks import restarts
from regrow.registry import refuse_clashes


@dataclass(frozen=True)
class TrainingCommand:
    """A command that trains.

    Args:
        name: as in ``regrow NAME``.
        config: dataclass of its options; it has ``output`` and ``method``, and may have ``layer``.
        description, example: what ``--help`` teaches.
        may_change: options that a resumed run may be given anew.
        presets: whether regrow comes with configurations for it.
    """

    name: str
    config: type
    description: str
    example: str
    may_change: Sequence[str]
    presets: bool = False

    def parse(self, argv: Sequence[str]) -> tuple[Any, Any, Any, bool]:
        """Configuration, method, layer option (None for a command without), and whether to resume.

        Raises:
            RegrowError: a file or the run to resume cannot be read, or an option is not what that run has.
        """
        asked, rest = read_sources(argv, presets=self.presets)
        given = rest if asked.resume else [*flags_of_files(asked), *rest]
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self.config)}
        run = RunDirectory(value_of("--output", given, default=defaults["output"]))
        resume = asked.resume or (restarts() > 0 and run.begun)  # torchrun repeats the command as it was
        saved = saved_flags(run) if resume else []
        flags = [*saved, *given]
        parser = self._parser(flags)
        config, *parts = _parse(parser, flags)
        if resume:
            refuse_changes((config, *parts), _parse(parser, saved), self.may_change)
        method, layer = (*parts, None)[:2]
        return config, method, layer, resume

    def saved(self, run: RunDirectory, *changes: str) -> Any:
        """The configuration of a run, with flags that change it.

        Raises:
            RegrowError: there is none, or it is damaged.
        """
        flags = [*saved_flags(run), *changes]
        return _parse(self._parser(flags), flags)[0]

    def _parser(self, flags: Sequence[str]) -> Any:
        """One that knows the options of the method and of the layer option that the flags name."""
        default: dict[str, Any] = {field.name: field.default for field in fields(self.config)}
        parts: dict[str, type] = {"method": method_class(value_of("--method", flags, default=default["method"]))}
        if "layer" in default:
            parts["layer"] = layer_class(value_of("--layer", flags, default=default["layer"]))
            refuse_clashes(self.config, *parts.values())
        parser_class: Any = type("TrainingParser", (OneLineParser, HfArgumentParser), {})
        parser = parser_class(
            self.config,
            prog=f"regrow {self.name}",
            usage=f"regrow {self.name} [--FLAG VALUE ...]",
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            description=f"{self.description} Every flag can also stand in a YAML file given with --config.",
            epilog=f"example: {self.example}",
        )
        add_sources(parser, presets=self.presets)
        for flag, part in parts.items():
            if fields(part):
                part._argument_group_name = f"options of --{flag} {part.name}"  # type: ignore[attr-defined]
            parser._add_dataclass_arguments(part)
            parser.dataclass_types.append(part)
        return parser


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Titles and what belongs to them, in two columns."""
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:{width}}  {text}" for title, text in rows)


def size_row(stored: int, dense: int) -> tuple[str, str]:
    """What a model takes, as a row of :func:`table`."""
    return "stored bytes", f"{stored:,} against {dense:,} dense ({stored / dense:.1%}, embeddings included)"


def _parse(parser: Any, argv: Sequence[str]) -> tuple[Any, ...]:
    """Configuration, method and layer option; a last result of the parser is the source flags, taken out before."""
    parser.parse_args(argv)  # unknown flags end here, in one line
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[: len(parser.dataclass_types)]
