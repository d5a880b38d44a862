"""``regrow methods``: list everything that can train, replace, compare or look."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from regrow.cli.catalog import details, listing, markdown
from regrow.cli.parser import OneLineParser


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow methods",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="List what regrow has of the literature around sparse training: methods that move blocks,\n"
        "controls over dense weights, layers, recipes, rules and tools, each with its paper, whether it is\n"
        "always sparse, and the command that runs it. With a NAME, all about one: what it does, its options.",
        epilog="examples:\n  regrow methods\n  regrow methods gse\n  regrow methods imp",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show one in full")
    parser.add_argument("--markdown", action="store_true", help="print docs/methods.md instead")
    asked = parser.parse_args(argv)
    if asked.name is not None and asked.markdown:
        parser.error("--markdown prints everything; leave NAME out")
    print(markdown() if asked.markdown else listing() if asked.name is None else details(asked.name))
    return 0
