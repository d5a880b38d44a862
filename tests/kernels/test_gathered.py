"""Blocks of 16 outputs and one input: values and gradients against the dense operation in float64."""

import pytest
import torch

from regrow.kernels import sddmm, spmm, spmm_t

from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense
from .problems import Pattern, check_product, from_dense, normal, pattern, to_dense

H = 16
TOKENS = [0, 1, 7, 63, 64, 200]


def check(p: Pattern, n: int, **how: bool) -> None:
    check_product(p, (H, 1), n, **how)


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("n", TOKENS)
def test_values_and_gradients(n: int, with_gelu: bool, isa: str, threads: int) -> None:
    check(pattern(5, 37, 50), n, with_gelu=with_gelu)


# One block row; one column; a single block, so nearly all rows and columns are empty; all blocks; one of each.
@pytest.mark.parametrize(
    ("n_rows", "n_cols", "n_blocks"), [(1, 90, 40), (9, 1, 4), (6, 50, 1), (7, 45, 315), (1, 1, 1), (3, 5, 0)]
)
def test_awkward_patterns(n_rows: int, n_cols: int, n_blocks: int, isa: str) -> None:
    check(pattern(n_rows, n_cols, n_blocks), 33)


def test_strided_input_without_bias() -> None:
    check(pattern(6, 100, 150), 70, with_bias=False, strided=True)


@pytest.mark.parametrize("with_gelu", [False, True])
def test_many_tiles(with_gelu: bool, isa: str) -> None:
    """More tokens, block rows and features than one tile holds."""
    check(pattern(40, 448, 40 * 448 // 10), 1111, with_gelu=with_gelu)


def test_threads_get_ranges_of_very_different_length(threads: int) -> None:
    check(pattern(80, 1024, 16 * 1024 // 2, crowded_rows=8), 600)


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(8, 3072), (192, 300)])
def test_long_rows_and_columns_are_summed_as_exactly_as_dense(
    n_rows: int, n_cols: int, density: float, isa: str
) -> None:
    check(pattern(n_rows, n_cols, round(density * n_rows * n_cols)), 64)


def test_one_long_column_among_empty_ones(isa: str) -> None:
    """Its sums are put aside between parts of the rows, which all others do not need."""
    index = [torch.arange(201), torch.full((200,), 3), torch.arange(200).flip(0)]
    row_ptr, col_idx, slot = (t.int() for t in index)
    p = Pattern(slot.flip(0).long().flip(0), col_idx.long(), 200, 9, (row_ptr, col_idx, slot), ())  # type: ignore[arg-type]
    check(p, 40)


@pytest.mark.parametrize("n", [1, 3, 500])
def test_bits_do_not_depend_on_threads(n: int, isa: str) -> None:
    """Products only: in the weight gradient the tokens are cut in two, as for all blocks."""
    p = pattern(40, 300, 3000)
    x, g, values = normal(n, 300, seed=1), normal(n, 40 * H, seed=2), normal(3000, H, 1, seed=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append((spmm(x, values, None, *p.index), spmm_t(g, values, *p.index, 300)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_gradient_twice(isa: str, threads: int) -> None:
    p = pattern(40, 300, 3000)
    g, x = normal(500, 40 * H, seed=1), normal(500, 300, seed=2)
    assert torch.equal(sddmm(g, x, *p.index, H, 1), sddmm(g, x, *p.index, H, 1))


def test_a_column_named_twice_in_a_row_counts_twice(isa: str) -> None:
    """No topology has that; the reference adds both, and so do the kernels, in whatever order they come."""
    index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 9], [1] * 9, list(range(9)))]
    values, g = normal(9, H, 1, seed=1), normal(40, H, seed=2)
    torch.testing.assert_close(spmm_t(g, values, *index, 4)[:, 1], g @ values.sum(0)[:, 0])


@pytest.mark.parametrize("b", [3, 16])
def test_reference(b: int) -> None:
    """Other heights and dtypes have no compiled kernel."""
    p = pattern(4, 9, 15)
    dtype = torch.float64
    x, values, g = (normal(*s, dtype=dtype) for s in ((9, 9), (15, b, 1), (9, 4 * b)))
    weight = to_dense(values, p)
    torch.testing.assert_close(spmm(x, values, None, *p.index), x @ weight.T)
    torch.testing.assert_close(spmm_t(g, values, *p.index, 9), g @ weight)
    torch.testing.assert_close(sddmm(g, x, *p.index, b, 1), from_dense(g.T @ x, p, b, 1))


def test_gradients_of_the_other_two(isa: str) -> None:
    p = pattern(5, 23, 40)
    g, x, values = normal(40, 5 * H, seed=1), normal(40, 23, seed=2), normal(40, H, 1, seed=3)
    h, k = normal(40, 23, seed=4), normal(40, H, 1, seed=5)
    for op, args, cotangent, dense in (
        (lambda g, v: spmm_t(g, v, *p.index, 23), (g, values), h, lambda g, v: g @ to_dense(v, p)),
        (lambda g, x: sddmm(g, x, *p.index, H, 1), (g, x), k, lambda g, x: from_dense(g.T @ x, p, H, 1)),
    ):
        runs = []
        for f, dtype in ((op, torch.float32), (dense, torch.float32), (dense, torch.float64)):
            leaves = [a.to(dtype).requires_grad_() for a in args]
            out = f(*leaves)
            runs.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))])
        for i, (ours, theirs, exact) in enumerate(zip(*runs, strict=True)):
            assert_as_good_as_dense(ours, theirs, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)
