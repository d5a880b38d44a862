"""Random block-sparse problems, built without the package's own topology."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from regrow.kernels import spmm, spmm_gelu

from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense


@dataclass(frozen=True)
class Pattern:
    """Coordinates of the blocks in slot order, the index arrays, and the same by columns."""

    rows: Tensor
    cols: Tensor
    n_rows: int
    n_cols: int
    index: tuple[Tensor, Tensor, Tensor]
    by_columns: tuple[Tensor, Tensor, Tensor]

    @property
    def n_blocks(self) -> int:
        return self.rows.numel()

    def to(self, device: torch.device | str) -> "Pattern":
        by_rows, by_columns = (tuple(t.to(device) for t in index) for index in (self.index, self.by_columns))
        return Pattern(self.rows.to(device), self.cols.to(device), self.n_rows, self.n_cols, by_rows, by_columns)


def pattern(n_rows: int, n_cols: int, n_blocks: int, seed: int = 0, crowded_rows: int | None = None) -> Pattern:
    """``n_blocks`` different random coordinates; slots are in no particular order.

    With ``crowded_rows`` all blocks but one lie in the first so many rows, and one in the last.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm((crowded_rows or n_rows) * n_cols, generator=generator)[:n_blocks]
    if crowded_rows is not None:
        flat[0] = n_rows * n_cols - 1
    rows, cols = flat // n_cols, flat % n_cols

    def ordered(major: Tensor, minor: Tensor, n_major: int, n_minor: int) -> tuple[Tensor, Tensor, Tensor]:
        slot = torch.argsort(major * n_minor + minor)
        ptr = torch.zeros(n_major + 1, dtype=torch.int64)
        ptr[1:] = torch.bincount(major, minlength=n_major).cumsum(0)
        return ptr.int(), minor[slot].int(), slot.int()

    by_rows, by_columns = ordered(rows, cols, n_rows, n_cols), ordered(cols, rows, n_cols, n_rows)
    return Pattern(rows, cols, n_rows, n_cols, by_rows, by_columns)


def to_dense(values: Tensor, p: Pattern) -> Tensor:
    """``[n_blocks, b, w]`` -> ``[R*b, C*w]``; differentiable."""
    _, b, width = values.shape
    grid = values.new_zeros(p.n_rows, p.n_cols, b, width).index_put((p.rows, p.cols), values)
    return grid.transpose(1, 2).reshape(p.n_rows * b, p.n_cols * width)


def from_dense(weight: Tensor, p: Pattern, b: int, width: int | None = None) -> Tensor:
    """The blocks of the pattern: the inverse of :func:`to_dense`."""
    return weight.view(p.n_rows, b, p.n_cols, width or b)[p.rows, :, p.cols, :]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_product(
    p: Pattern,
    block: tuple[int, int],
    n: int,
    *,
    with_bias: bool = True,
    strided: bool = False,
    with_gelu: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Forward and backward of ``spmm`` with a random cotangent, against dense in the same dtype and float64."""
    ours_is, act = (spmm_gelu, gelu) if with_gelu else (spmm, lambda y: y)
    b, width = block
    x, values = normal(n, p.n_cols * width, seed=1), normal(p.n_blocks, b, width, seed=2)
    bias = normal(p.n_rows * b, seed=3) if with_bias else None
    cotangent = normal(n, p.n_rows * b, seed=4)
    x, values, bias, cotangent = (None if t is None else t.to(device, dtype) for t in (x, values, bias, cotangent))
    p = p.to(device)
    if strided:
        x, cotangent = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, cotangent))
        assert n < 2 or not x.is_contiguous()

    def run(of: torch.dtype | None) -> list[Tensor]:
        leaves = [None if t is None else t.to(of or dtype).requires_grad_() for t in (x, values, bias)]
        lx, lv, lb = leaves
        y = ours_is(lx, lv, lb, *p.index) if of is None else act(linear(lx, to_dense(lv, p), lb))
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent.to(y.dtype))
        return [y.detach(), *grads]

    results = zip(run(None), run(dtype), run(torch.float64), strict=True)
    for i, (ours, dense, exact) in enumerate(results):
        assert_as_good_as_dense(ours, dense, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)
