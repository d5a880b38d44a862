"""What a method may look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow import kernels
from regrow.errors import RegrowError
from regrow.methods.scores import Norm, block_norm, strongest
from regrow.nn.shape import BlockShape
from regrow.ranks import rank, summed
from regrow.topology import BlockTopology, ExploredPositions

_SHARE = 16  # a piece of a dense gradient holds at most this fraction of its positions


@dataclass(frozen=True)
class Signals:
    """What a method may look at when one layer is updated.

    On several ranks all of it is the same on each: weights, optimizer state and indices because every rank computes
    them alike, ``gradient`` because its answers are sums over the ranks.

    Args:
        values: [n_blocks, b, b] the layer's blocks, by slot.
        topology: where the slots are.
        fraction: share of blocks the schedule asks to move, in [0, 1].
        generator: the only source of randomness a method may use; seeded alike on every rank.
        progress: share of the training that is over, in [0, 1].
        start_blocks: how many blocks the layer had when training began; the present number if absent.
        target: how many blocks it must have after the update; the present number if absent.
        explored: positions it ever used; those in use if absent.
        momentum: [n_blocks, b, b] the optimizer's running mean of gradients, if it keeps one.
        gradient: the layer's dense gradient, piece by piece; only for methods with ``needs_gradient``.
    """

    values: Tensor
    topology: BlockTopology
    fraction: float
    generator: torch.Generator
    progress: float = 0.0
    start_blocks: int | None = None
    target: int | None = None
    explored: ExploredPositions | None = None
    momentum: Tensor | None = None
    gradient: Gradient | None = None

    @property
    def n_moved(self) -> int:
        """Number of blocks the schedule asks to move, ``round(fraction * n_blocks)``."""
        return round(self.fraction * self.topology.n_blocks)

    @property
    def n_after(self) -> int:
        """Number of blocks the layer must have after the update."""
        return self.topology.n_blocks if self.target is None else self.target


class Gradient:
    """The gradient of a layer's full weight, ``G = g^T x``, without ever forming it.

    Asked at candidate positions it is one more ``sddmm``; asked for its strongest positions it is computed in pieces of
    at most 1/16 of the weight (or one block), each reduced to block norms at once. On several ranks every answer is
    of the summed gradient, so all ranks decide alike.

    Args:
        x: [N, in] inputs of the layer.
        g: [N, out] gradient of its outputs.
        block_size: ``b``, dividing both, or outputs and inputs of a block, ``(b, w)``, dividing one each.

    Example:
        >>> gradient = Gradient(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]]), block_size=1)
        >>> gradient.at(torch.tensor([1]), torch.tensor([0])).flatten().tolist()
        [-4.0]
        >>> gradient.strongest(2, excluded=torch.tensor([3])).tolist()  # G = [[3, 6], [-4, -8]]
        [1, 2]
    """

    def __init__(self, x: Tensor, g: Tensor, block_size: int | tuple[int, int]) -> None:
        shape = BlockShape.of(block_size)
        if x.shape[0] != g.shape[0] or x.shape[1] % shape.cols or g.shape[1] % shape.rows:
            raise RegrowError(f"x {list(x.shape)} and g {list(g.shape)} do not fit blocks of {shape}")
        self.x, self.g, self.block_shape, self.block_size = x, g, shape, shape.rows
        self.n_block_rows, self.n_block_cols = g.shape[1] // shape.rows, x.shape[1] // shape.cols

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """``[n, b, w]``: the blocks of ``G`` at distinct block positions."""
        topology = BlockTopology.from_coordinates(
            rows, cols, n_block_rows=self.n_block_rows, n_block_cols=self.n_block_cols
        )
        return summed(kernels.sddmm(self.g, self.x, *topology.indices(), *self.block_shape))

    def strongest(self, k: int, *, excluded: Tensor, norm: Norm = "l1") -> Tensor:
        """Flat positions of the ``k`` blocks of ``G`` of largest norm that are not ``excluded``, strongest first."""
        return strongest(positions_of(self.norms(norm)), k, excluded=excluded)

    def norms(self, norm: Norm = "l1") -> Iterator[tuple[int, Tensor]]:
        """Block norms of ``G``, a few block rows at a time: ``(first block row, norms [m, C])``."""
        (b, w), n_rows, n_cols = self.block_shape, self.n_block_rows, self.n_block_cols
        row_step = max(1, n_rows // _SHARE)
        col_step = max(1, min(n_cols, n_rows * n_cols // (_SHARE * row_step)))
        for first in range(0, n_rows, row_step):
            g = self.g[:, first * b : (first + row_step) * b]
            parts = []
            for c in range(0, n_cols, col_step):
                piece = summed(g.T @ self.x[:, c * w : (c + col_step) * w])
                rows, cols = piece.shape[0] // b, piece.shape[1] // w
                blocks = piece.view(rows, b, cols, w).transpose(1, 2).reshape(rows * cols, b, w)
                parts.append(block_norm(blocks, norm).view(rows, cols))
            yield first, torch.cat(parts, dim=1)

    def strengths(self) -> tuple[Tensor, Tensor]:
        """``([R], [C])``: sums of ``|g|`` over the tokens and features of a block row, of ``|x|`` of a block column."""
        sides = zip((self.g, self.x), self.block_shape, strict=True)
        rows, cols = (summed(t.abs().sum(0).view(-1, edge).sum(1)) for t, edge in sides)
        return rows, cols

    def side_norms(self) -> tuple[Tensor, Tensor]:
        """``([R], [C])``: Frobenius norms of ``g`` over tokens and features of a block row, of ``x`` of a block column.

        The Frobenius norm of the block of ``G`` at ``(i, j)`` is at most the product of its two: Cauchy and Schwarz.
        """
        squares = (torch.linalg.vector_norm(t, dim=0).double().square() for t in (self.g, self.x))
        sides = zip(squares, self.block_shape, strict=True)
        rows, cols = (summed(square.view(-1, edge).sum(1)).sqrt() for square, edge in sides)
        return rows, cols

    def sketches(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``([R], [C])``: block sums of ``|s^T g|`` and ``|s^T x|`` for random signs ``s``, one a token.

        The product of the two signed sketches is an unbiased estimate of ``G``.
        """
        seed = int(torch.randint(2**62, (), generator=generator))  # the shared source may not depend on a rank's tokens
        own = torch.Generator().manual_seed(seed + rank())
        signs = torch.randint(2, (self.x.shape[0],), generator=own).to(self.x) * 2 - 1
        sides = zip((self.g, self.x), self.block_shape, strict=True)
        rows, cols = (summed(signs @ t).abs().view(-1, edge).sum(1) for t, edge in sides)
        return rows, cols


def positions_of(rows: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores by rows as flat pieces: ``(first row, [m, C]) -> (flat positions [m * C], scores [m * C])``."""
    for first, scores in rows:
        start = first * scores.shape[1]
        yield torch.arange(start, start + scores.numel(), device=scores.device), scores.flatten()
