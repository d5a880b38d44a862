"""``regrow advise``: which block sizes and densities pay off on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regrow.bench.advise import advise as measure
from regrow.bench.advise import table
from regrow.bench.baseline import onednn_over_linear
from regrow.cli.bench import note_on_baseline
from regrow.cli.parser import OneLineParser, list_of, shape
from regrow.errors import RegrowError


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow advise",
        description="For each layer shape and block size: the sparsity beyond which sparse training beats dense on "
        "this machine, and the expected speed-up of a training step. Measured once, then remembered.",
        epilog="example: regrow advise small    or: regrow advise 512x2048,2048x512 --blocks 16",
    )
    parser.add_argument("target", metavar="WHAT", help="tiny ... large, shapes as 512x2048, or a model directory")
    parser.add_argument("--blocks", type=list_of(int), default="1,4,8,16,32", help="block sizes")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the input")
    asked = parser.parse_args(argv)
    print(table(measure(_shapes_of(asked.target), blocks=asked.blocks, tokens=asked.tokens, progress=True)))
    note_on_baseline(onednn_over_linear())
    return 0


def _shapes_of(target: str) -> list[tuple[int, int]]:
    """Encoder layer shapes of a size, a model directory, or a list."""
    from regrow.bert.sizes import SIZES

    if target in SIZES:
        hidden, inner = SIZES[target].hidden, 4 * SIZES[target].hidden
    elif (Path(target) / "config.json").is_file():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(target)
        hidden, inner = config.hidden_size, config.intermediate_size
    else:
        try:
            return list_of(shape)(target)
        except ValueError:
            raise RegrowError(
                f"{target!r} is no size ({', '.join(SIZES)}), no model directory, and no list of shapes as 512x2048"
            ) from None
    return [(hidden, hidden), (hidden, inner), (inner, hidden)]
