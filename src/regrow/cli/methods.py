"""``regrow methods``: list the sparse-training methods."""

from __future__ import annotations

from collections.abc import Sequence

from regrow.cli.parser import OneLineParser
from regrow.methods.catalog import listing, markdown


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow methods",
        description="List the sparse-training methods: year, always sparse or not, what they look at, what an update "
        "costs, and their options.",
        epilog="example: regrow pretrain --method gse --sampling norms",
    )
    parser.add_argument("--markdown", action="store_true", help="print docs/methods.md instead")
    print(markdown() if parser.parse_args(argv).markdown else listing())
    return 0
