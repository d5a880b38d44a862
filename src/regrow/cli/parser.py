"""What the commands share: exit statuses, a parser, and values that options take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

INCOMPLETE, FAILED, INTERRUPTED = 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line that says where help is, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_subcommand(
    parser: OneLineParser, argv: Sequence[str], subcommands: Mapping[str, Callable[[Sequence[str]], int]], summary: str
) -> int:
    """Run the subcommand that comes first; what follows is its own."""
    parser.add_argument("what", choices=list(subcommands), help=summary)
    return subcommands[parser.parse_args(argv[:1]).what](argv[1:])


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes several, with commas between."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated list"  # argparse names the type in its errors
    return parse


def block(text: str) -> int | tuple[int, int]:
    """The type of an option that takes blocks: an edge, as 16, or outputs by inputs, as 16x1."""
    rows, _, cols = text.lower().partition("x")
    return (int(rows), int(cols)) if cols else int(rows)


def shape(text: str) -> tuple[int, int]:
    """The type of an option that takes the shape of a layer, as 512x2048."""
    in_features, out_features = text.lower().split("x")
    return int(in_features), int(out_features)
