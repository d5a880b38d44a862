"""``regrow methods``: list the sparse-training methods, and what may stand in the place of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from regrow.cli.parser import OneLineParser
from regrow.methods.catalog import layer_listing, layer_markdown, listing, markdown


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow methods",
        description="List the sparse-training methods: year, always sparse or not, what they look at, what an update "
        "costs, and their options.",
        epilog="example: regrow pretrain --method gse --sampling norms",
    )
    parser.add_argument("--markdown", action="store_true", help="print docs/methods.md or docs/layers.md instead")
    parser.add_argument("--layers", action="store_true", help="list what may stand in the place of a linear layer")
    asked = parser.parse_args(argv)
    if asked.layers:
        print(layer_markdown() if asked.markdown else layer_listing())
    else:
        print(markdown() if asked.markdown else listing())
    return 0
