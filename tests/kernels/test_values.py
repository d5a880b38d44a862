"""Values and gradients against the dense operation in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from regrow.kernels import sddmm, spmm, spmm_t

from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense
from .problems import Pattern, check_product, from_dense, normal, pattern, to_dense

BLOCKS = [1, 2, 4, 8, 16, 32, 64]
TOKENS = [0, 1, 7, 63, 64, 200]


def check(p: Pattern, b: int, n: int, **how: bool) -> None:
    check_product(p, (b, b), n, **how)


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("b", BLOCKS)
def test_values_and_gradients(b: int, n: int, isa: str, threads: int) -> None:
    n_rows, n_cols = (5, 3) if b >= 16 else (83 // b, 131 // b)
    check(pattern(n_rows, n_cols, max(1, n_rows * n_cols // 4), seed=b), b, n)


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("b", BLOCKS)
def test_values_and_gradients_with_gelu(b: int, n: int, isa: str, threads: int) -> None:
    n_rows, n_cols = (5, 3) if b >= 16 else (83 // b, 131 // b)
    check(pattern(n_rows, n_cols, max(1, n_rows * n_cols // 4), seed=b), b, n, with_gelu=True)


def test_gelu_and_its_slope_everywhere(isa: str) -> None:
    """Through a weight of one, so that the input of the activation is ours to choose; a short stretch at a time."""
    h = torch.linspace(-8, 16, 24 * 500)  # below, even float64 cannot tell gelu from zero
    index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    ours = torch.ops.regrow.spmm_gelu(h[:, None], torch.ones(1, 1, 1), None, *index, True)

    def dense(h: Tensor) -> tuple[Tensor, Tensor]:
        h = h.clone().requires_grad_()
        y = gelu(h)
        return y.detach(), *torch.autograd.grad(y.sum(), h)

    for all_ours, all_dense, all_exact in zip(ours, dense(h), dense(h.double()), strict=True):
        for parts in zip(all_ours.squeeze(1).split(500), all_dense.split(500), all_exact.split(500), strict=True):
            assert_as_good_as_dense(*parts)


def test_gelu_of_what_is_huge_or_no_number(isa: str) -> None:
    h = torch.tensor([0.0, 1e-38, 1e30, -1e30, torch.inf, torch.nan])
    index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    y, slope = torch.ops.regrow.spmm_gelu(h[:, None], torch.ones(1, 1, 1), None, *index, True)
    expected = torch.tensor([0.0, 5e-39, 1e30, 0.0, torch.inf, torch.nan])
    torch.testing.assert_close(y.squeeze(1), expected, equal_nan=True)
    torch.testing.assert_close(slope[:5].squeeze(1), torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0]))
    assert slope[5].isnan()


# One block row; one block column; a single block, so nearly all rows and columns are empty; all blocks.
@pytest.mark.parametrize(("n_rows", "n_cols", "n_blocks"), [(1, 9, 4), (9, 1, 4), (6, 5, 1), (7, 5, 35), (1, 1, 1)])
@pytest.mark.parametrize("b", BLOCKS)
def test_awkward_patterns(b: int, n_rows: int, n_cols: int, n_blocks: int, isa: str) -> None:
    check(pattern(n_rows, n_cols, n_blocks), b, 33)


@pytest.mark.parametrize("b", [1, 4, 16])
def test_strided_input_without_bias(b: int) -> None:
    check(pattern(6, 10, 15), b, 70, with_bias=False, strided=True)


@pytest.mark.parametrize("b", [1, 8, 16, 32])
def test_threads_get_ranges_of_very_different_length(b: int, threads: int) -> None:
    """Threads share the blocks, so a few crowded rows weigh as much as hundreds of empty ones."""
    check(pattern(1280 // b, 1024 // b, 2 * 1024 // b, crowded_rows=max(8, 128 // b)), b, 600)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("b", [1, 4, 16, 64])
def test_long_rows_are_summed_as_exactly_as_dense(b: int, density: float, isa: str) -> None:
    n_rows, n_cols = 128 // b, 3072 // b
    check(pattern(n_rows, n_cols, max(1, round(density * n_rows * n_cols))), b, 64)


@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("with_gelu", [False, True])
def test_many_tiles(b: int, with_gelu: bool, isa: str) -> None:
    """More tokens and features than one tile holds."""
    check(pattern(256 // b, 448 // b, max(1, 256 * 448 // (10 * b * b))), b, 1111, with_gelu=with_gelu)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("n", [7, 333, 1300])
def test_rows_in_several_chunks(n: int, density: float, isa: str, threads: int) -> None:
    """Rows of single elements long enough to be taken in chunks, and more of them than are worked on together."""
    check(pattern(300, 600, round(density * 300 * 600)), 1, n)


@pytest.mark.parametrize("b", [3, 5, 16])
def test_reference_dtypes(b: int) -> None:
    """Block sizes and dtypes without a compiled kernel go to the reference."""
    p = pattern(4, 3, 5)
    x, values = normal(9, 3 * b, seed=1, dtype=torch.float64), normal(5, b, b, seed=2, dtype=torch.float64)
    g = normal(9, 4 * b, seed=3, dtype=torch.float64)
    weight = to_dense(values, p)
    torch.testing.assert_close(spmm(x, values, None, *p.index), x @ weight.T)
    torch.testing.assert_close(spmm_t(g, values, *p.index, 3 * b), g @ weight)
    torch.testing.assert_close(sddmm(g, x, *p.index, b), from_dense(g.T @ x, p, b))
    low = spmm(x.bfloat16(), values.bfloat16(), None, *p.index)
    assert_as_good_as_dense(low, linear(x.bfloat16(), weight.bfloat16()), x @ weight.T)


@pytest.mark.parametrize("b", BLOCKS)
def test_operations_alone(b: int, isa: str) -> None:
    """Each operation without autograd, and the gradients of the two that ``spmm`` does not differentiate."""
    p = pattern(5, 7, 12)
    g, x, values = normal(40, 5 * b, seed=1), normal(40, 7 * b, seed=2), normal(12, b, b, seed=3)
    h, k = normal(40, 7 * b, seed=4), normal(12, b, b, seed=5)
    for op, args, cotangent, dense in (
        (lambda g, v: spmm_t(g, v, *p.index, 7 * b), (g, values), h, lambda g, v: g @ to_dense(v, p)),
        (lambda g, x: sddmm(g, x, *p.index, b), (g, x), k, lambda g, x: from_dense(g.T @ x, p, b)),
    ):
        runs = []
        for f, dtype in ((op, torch.float32), (dense, torch.float32), (dense, torch.float64)):
            leaves = [a.to(dtype).requires_grad_() for a in args]
            out = f(*leaves)
            runs.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))])
        for i, (ours, theirs, exact) in enumerate(zip(*runs, strict=True)):
            assert_as_good_as_dense(ours, theirs, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("b", BLOCKS)
def test_same_bits_twice(b: int, isa: str, threads: int) -> None:
    p = pattern(96 // min(b, 16), 128 // min(b, 16), 20)
    x, g = normal(500, p.n_cols * b, seed=1), normal(500, p.n_rows * b, seed=2)
    values = normal(20, b, b, seed=3)
    for op in (
        lambda: spmm(x, values, None, *p.index),
        lambda: spmm_t(g, values, *p.index, p.n_cols * b),
        lambda: sddmm(g, x, *p.index, b),
    ):
        assert torch.equal(op(), op())


@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("n", [1, 3, 500])
def test_the_transposed_product_takes_rows_in_order(b: int, n: int, isa: str, threads: int) -> None:
    """However many threads sort the blocks by columns: the bits are those of the transposed weight's own product."""
    for p in (pattern(48, 16, 200), pattern(9, 16, 20, crowded_rows=3), pattern(1, 7, 5), pattern(7, 1, 5)):
        g, values = normal(n, p.n_rows * b, seed=1), normal(p.n_blocks, b, b, seed=2)
        expected = spmm(g, values.mT, None, *p.by_columns)
        assert torch.equal(spmm_t(g, values, *p.index, p.n_cols * b), expected)
