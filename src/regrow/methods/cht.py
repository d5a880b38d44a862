"""CHT, Cannistraci-Hebb training: growth predicted from the topology alone. Always sparse.

Y. Zhang, J. Zhao, W. Wu, A. Muscoloni, C. V. Cannistraci, *Epitopological learning and Cannistraci-Hebb network shape
intelligence brain-inspired theory for ultra-sparse advantage in deep learning*, ICLR 2024,
https://openreview.net/forum?id=iayEcORsGd; score CH2-L3n of the authors' later code.

The ``k`` weakest blocks go. In the bipartite graph ``A`` of the blocks that are left (block rows and block columns
are the nodes), every pair that is not linked is scored by its paths of length three, each weighted by how much its
inner nodes keep to themselves:

.. math:: c = A A^T, \\quad W_{ij} = [c_{ij} > 0]\\, \\frac{c_{ij} + 1}{\\max(d_j - c_{ij}, 1)}, \\quad
          S = W_{row} A + (W_{col} A^T)^T

with ``d`` the degrees. The ``k`` best come, at zero; one that was just dropped stays as it is. Pairs without any such
path score 0 and are taken last, lowest position first. Scores are made a few block rows at a time.

An update of 3 x 3 positions. Blocks lie at (0,0), (0,1), (1,0), (1,1), (2,1) and, the weakest, (2,2). Without it ``A
= [[1, 1, 0], [1, 1, 0], [0, 1, 0]]``. Rows: ``c = [[2, 2, 1], [2, 2, 1], [1, 1, 1]]``, degrees ``(2, 2, 1)``, so ``W
= [[3, 3, 2], [3, 3, 2], [2, 2, 2]]`` and ``W A = [[6, 8, 0], [6, 8, 0], [4, 6, 0]]``. Columns: ``c = [[2, 2, 0], [2,
3, 0], [0, 0, 0]]``, degrees ``(2, 3, 0)``, ``W = [[3, 3, 0], [3, 4, 0], [0, 0, 0]]``, ``(W A^T)^T = [[6, 7, 0], [6,
7, 0], [3, 4, 0]]``. The best empty position is (2, 0) with 4 + 3 = 7:

    >>> import torch
    >>> from regrow import BlockTopology
    >>> from regrow.methods import Signals, create
    >>> rows, cols = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 2]
    >>> topology = BlockTopology.from_coordinates(rows, cols, n_block_rows=3, n_block_cols=3)
    >>> values = torch.tensor([5.0, 4.0, 3.0, 6.0, 7.0, 1.0]).view(6, 1, 1)
    >>> left = BlockTopology.from_coordinates(rows[:5], cols[:5], n_block_rows=3, n_block_cols=3)
    >>> torch.cat([scores for _, scores in ch2_l3n(left)])
    tensor([[12., 15.,  0.],
            [12., 15.,  0.],
            [ 7., 10.,  0.]])
    >>> signals = Signals(values, topology, fraction=1 / 6, generator=torch.Generator().manual_seed(0))
    >>> update = create("cht").propose(signals)
    >>> update.slots.tolist(), update.rows.tolist(), update.cols.tolist()
    ([5], [2], [0])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow import kernels
from regrow.methods.base import LayerSize, Method, register
from regrow.methods.rules import exchange_keeping, keys_without
from regrow.methods.scores import Norm, block_norm, check_norm, strongest, weakest
from regrow.methods.signals import Signals, positions_of
from regrow.topology import BlockTopology, TopologyUpdate

_PIECES = 16  # no piece of a score matrix holds more than this fraction of the positions (or one row of them)


@register("cht")
@dataclass(frozen=True)
class CHT(Method):
    """Prune the weakest blocks, grow the links the network's own shape predicts best."""

    paper = "Zhang et al., Epitopological learning and Cannistraci-Hebb network shape intelligence"
    year = 2024
    link = "https://openreview.net/forum?id=iayEcORsGd"

    norm: Norm = field(default="l1", metadata={"help": "block norm that ranks blocks for removal"})

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        dropped = weakest(block_norm(signals.values, self.norm), min(signals.n_moved, topology.n_blocks - 1))
        kept = keys_without(topology, dropped)
        positions = strongest(positions_of(ch2_l3n(graph(topology, kept))), dropped.numel(), excluded=kept)
        return exchange_keeping(topology, dropped, positions)

    def update_flops(self, layer: LayerSize, tokens: int) -> int:
        return ch2_l3n_flops(layer)


def graph(topology: BlockTopology, keys: Tensor) -> BlockTopology:
    """The positions ``keys`` of a layer as a graph."""
    n_cols = topology.n_block_cols
    return BlockTopology.from_coordinates(
        keys // n_cols, keys % n_cols, n_block_rows=topology.n_block_rows, n_block_cols=n_cols
    )


def ch2_l3n(links: BlockTopology) -> Iterator[tuple[int, Tensor]]:
    """CH2-L3n scores of all pairs, a few block rows at a time: ``(first block row, scores [m, C])``.

    The adjacency ``A`` is a sparse matrix of ones, so its products are the library's own kernels at block edge 1.
    """
    index, n_cols = links.indices(), links.n_block_cols
    ones = torch.ones(links.n_blocks, 1, 1, device=links.slot.device)
    rows, cols = links.coordinates()
    row_degree = links.row_ptr.diff().float()
    col_degree = torch.bincount(cols, minlength=n_cols).float()
    for first, last in _pieces(links.n_block_rows, n_cols):
        a = _adjacency(rows, cols, first, last, n_cols)
        shared = kernels.spmm(a, ones, None, *index)  # [m, R]: common neighbours of two block rows
        scores = kernels.spmm_t(_weights(shared, row_degree), ones, *index, n_cols)
        for left, right in _pieces(n_cols, links.n_block_rows, row=n_cols):
            a_t = _adjacency(cols, rows, left, right, links.n_block_rows)
            shared = kernels.spmm_t(a_t, ones, *index, n_cols)  # [m, C]: common neighbours of two block columns
            scores[:, left:right] += a @ _weights(shared, col_degree).T
        yield first, scores


def ch2_l3n_flops(layer: LayerSize) -> int:
    """FLOPs of all scores of a layer: two sparse products by rows, one by columns for every piece, one dense."""
    rows, cols = layer.out_features // layer.block_shape.rows, layer.in_features // layer.block_shape.cols
    n_pieces = len(list(_pieces(rows, cols)))
    return 2 * (2 * rows * layer.n_blocks + n_pieces * cols * layer.n_blocks + rows * cols * cols)


def _weights(shared: Tensor, degree: Tensor) -> Tensor:
    return (shared > 0) * (shared + 1) / (degree - shared).clamp_min(1)


def _pieces(n: int, other: int, row: int | None = None) -> Iterator[tuple[int, int]]:
    """``0..n`` cut so that a piece times ``row`` (default ``other``) is at most 1/16 of ``n * other``, at least one."""
    step = max(1, n * other // (_PIECES * (other if row is None else row)))
    for first in range(0, n, step):
        yield first, min(first + step, n)


def _adjacency(rows: Tensor, cols: Tensor, first: int, last: int, width: int) -> Tensor:
    inside = (rows >= first) & (rows < last)
    a = torch.zeros(last - first, width, device=rows.device)
    a[rows[inside] - first, cols[inside]] = 1
    return a
