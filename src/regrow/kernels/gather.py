"""Products with listed rows of a table, float32 on a CPU: what activation sparsity is made of.

Which rows take part differs from row to row of the result, and the cost is that of reading what is listed, once for
every list. Raw tensors in and out, no gradients: :mod:`regrow.kernels.spark` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.kernels import cpu


class Lists(NamedTuple):
    """A list of table rows for each row of a result: row ``r`` owns positions ``ptr[r]`` to ``ptr[r + 1]`` of ``idx``.

    Args:
        ptr: ``[rows + 1]`` int32.
        idx: ``[n]`` int32, ascending in a list, below ``of``.
        of: rows of the table.
    """

    ptr: Tensor
    idx: Tensor
    of: int

    @property
    def rows(self) -> int:
        return self.ptr.shape[0] - 1


def gather_sum(
    lists: Lists,
    weights: Tensor,
    table: Tensor,
    *,
    start: Tensor | None = None,
    columns: slice = slice(None),
    copied: Tensor | None = None,
    out: Tensor | None = None,
    out_at: int = 0,
) -> Tensor:
    """``out[r] = start + sum over the list of r of weights[p] * table[idx[p]]``.

    Args:
        weights: ``[n]``, one for each position of the lists.
        table: ``[of, width]``, contiguous.
        start: one for each of the columns; nothing if absent.
        columns: of the table that take part; all by default.
        copied: what :func:`copy_table` made of the table, which is then not read itself; for all columns.
        out: ``[rows, ...]``, contiguous, whose columns from ``out_at`` on are written; a new tensor if absent.

    Example:
        >>> lists = Lists(torch.tensor([0, 2, 3]).int(), torch.tensor([0, 2, 1]).int(), of=3)
        >>> gather_sum(lists, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        tensor([[3., 2.],
                [0., 3.]])
    """
    begin, end, _ = columns.indices(table.shape[1])
    if out is None:
        out = table.new_empty(lists.rows, end - begin)
    arrays = table, copied, lists.ptr, lists.idx, weights, start, out
    sizes = begin, lists.of, table.shape[1], end - begin, lists.rows, lists.idx.shape[0], out_at, out.shape[1]
    cpu.call("gather_sum", arrays, *sizes)
    return out


def copy_table(table: Tensor) -> Tensor:
    """The table in the order in which :func:`gather_sum` reads it fastest, for this instruction set.

    Where lists are long it makes such a copy itself, at every call.

    Example:
        >>> lists, table = Lists(torch.tensor([0, 1]).int(), torch.tensor([1]).int(), of=2), torch.eye(2)
        >>> gather_sum(lists, torch.ones(1), table, copied=copy_table(table))
        tensor([[0., 1.]])
    """
    copied = table.new_empty(table.numel())
    cpu.call("gather_copy", (table, copied), *table.shape)
    return copied


def gather_dot(lists: Lists, lead: Tensor, table: Tensor, *, lead_at: int = 0) -> Tensor:
    """``[n]``: for every position of the list of row ``r``, the product of ``lead[r]`` and the table's row.

    Args:
        lead: ``[rows, ...]``, contiguous, whose columns from ``lead_at`` on are multiplied.
        table: ``[of, width]``, contiguous.
    """
    dots = table.new_empty(lists.idx.shape[0])
    arrays = table, lists.ptr, lists.idx, lead, dots
    width = table.shape[1]
    cpu.call("gather_dot", arrays, lists.of, width, width, lists.rows, lists.idx.shape[0], lead_at, lead.shape[1])
    return dots


def top_columns(x: Tensor, norms: Tensor | None, keep: int) -> tuple[Lists, Tensor]:
    """For every row the ``keep`` columns with the greatest ``|x| * norms``, and what ``x`` is there.

    Of equal ones those further left. Nothing is sorted.

    Args:
        x: ``[rows, columns]``.
        norms: ``[columns]``, not negative; 1 if absent.

    Returns:
        lists of columns, and ``[rows * keep]`` numbers.

    Raises:
        RegrowError: there are fewer columns.

    Example:
        >>> lists, numbers = top_columns(torch.tensor([[3.0, -5.0, 4.0]]), torch.tensor([2.0, 1.0, 1.0]), 2)
        >>> lists.idx.tolist(), numbers.tolist()
        ([0, 1], [3.0, -5.0])
    """
    rows, columns = x.shape
    idx, numbers = torch.empty(rows * max(keep, 0), dtype=torch.int32), x.new_empty(rows * max(keep, 0))
    cpu.call("top_columns", (x, norms, idx, numbers), rows, columns, keep)
    return Lists(
        torch.arange(0, rows * keep + 1, keep).int() if keep else idx.new_zeros(rows + 1), idx, columns
    ), numbers


def transposed(lists: Lists, numbers: Sequence[Tensor]) -> tuple[Lists, list[Tensor], Tensor]:
    """For each row of the table, the rows whose lists name it, ascending.

    Args:
        numbers: three ``[n]``, each of which goes with a position.

    Returns:
        the lists, the numbers in their order, and ``[of]`` sums of the last of them over every list.
    """
    n = lists.idx.shape[0]
    turned = Lists(torch.empty(lists.of + 1, dtype=torch.int32), torch.empty_like(lists.idx), lists.rows)
    moved, sums = [torch.empty_like(number) for number in numbers], numbers[-1].new_empty(lists.of)
    arrays = lists.ptr, lists.idx, *numbers, turned.ptr, turned.idx, *moved, sums
    cpu.call("transpose_lists", arrays, lists.rows, lists.of, n)
    return turned, moved, sums
