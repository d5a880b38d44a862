"""How a weight is cut into blocks."""

from __future__ import annotations

from typing import NamedTuple

from regrow.errors import RegrowError

BLOCK_SIZES = (1, 4, 8, 16, 32, 64)
GATHERED_ROWS = 16


class BlockShape(NamedTuple):
    """Outputs (``rows``) by inputs (``cols``) of a block: square, or 16 x 1, which are gathered blocks.

    >>> str(BlockShape(16, 16)), str(BlockShape(16, 1)), BlockShape(16, 1).numbers
    ('16', '16x1', 16)
    """

    rows: int
    cols: int

    @classmethod
    def of(cls, block: int | tuple[int, int]) -> BlockShape:
        """From the edge of a square, or from both edges.

        >>> BlockShape.of(4), BlockShape.of((16, 1))
        (BlockShape(rows=4, cols=4), BlockShape(rows=16, cols=1))
        """
        return cls(block, block) if isinstance(block, int) else cls(*block)

    @classmethod
    def parse(cls, text: str) -> BlockShape:
        """From ``"16"`` or ``"16x1"``.

        Raises:
            ValueError: it is neither.

        >>> BlockShape.parse("16x1")
        BlockShape(rows=16, cols=1)
        """
        rows, _, cols = text.partition("x")
        return cls(int(rows), int(cols or rows))

    @property
    def is_square(self) -> bool:
        return self.rows == self.cols

    @property
    def label(self) -> int | str:
        """For reports: the edge of a square, else as ``str``."""
        return self.rows if self.is_square else str(self)

    @property
    def numbers(self) -> int:
        """Weights of a block."""
        return self.rows * self.cols

    def grid(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Block rows and block columns of a weight ``[out_features, in_features]``.

        Raises:
            RegrowError: there are no such blocks, or they do not divide a dimension.

        >>> BlockShape(16, 1).grid(in_features=24, out_features=32)
        (2, 24)
        """
        if self.is_square:
            if self.rows not in BLOCK_SIZES:
                raise RegrowError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.rows}")
        elif self != (GATHERED_ROWS, 1):
            raise RegrowError(f"blocks must be square or {GATHERED_ROWS}x1, got {self}")
        for name, size, edge in (("in_features", in_features, self.cols), ("out_features", out_features, self.rows)):
            if size < 1 or size % edge:
                raise RegrowError(
                    f"block_size {self} does not divide {name}={size}; choose a block size that divides both "
                    f"in_features={in_features} and out_features={out_features}"
                )
        return out_features // self.rows, in_features // self.cols

    def __str__(self) -> str:
        return str(self.rows) if self.is_square else f"{self.rows}x{self.cols}"
