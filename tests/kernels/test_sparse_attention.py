"""Attention with the products around it as one operator: values, gradients, and what else it promises."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from regrow.errors import RegrowError
from regrow.kernels import attention, sparse_attention, spmm
from regrow.kernels.attention import reference_attention, reference_attention_backward

from ..allocations import LargestTensor
from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense
from .problems import Pattern, from_dense, normal, pattern, to_dense

BLOCKS = [1, 2, 4, 8, 16, 32, 64]
NAMES = ("x", "values1", "bias1", "values2", "bias2")
# Lengths of the sequences: one token; none at all; none in between; tails of every kind; several blocks of queries.
LENGTHS = [[1], [0], [], [5, 0, 0, 3], [16, 17, 1, 33], [64, 65, 130]]


class Problem:
    """Both weights of ``heads`` heads of ``dim``, of which a share of the blocks exists, and tokens of ``lengths``."""

    def __init__(
        self,
        b: int,
        lengths: list[int],
        heads: int = 2,
        dim: int = 64,
        *,
        n_in: int = 128,
        n_out: int = 64,
        density: float = 0.3,
        p: float = 0.0,
        biases: bool = True,
    ) -> None:
        self.b, hidden = b, heads * dim
        self.p1 = self.pattern(3 * hidden // b, n_in // b, density, 1)
        self.p2 = self.pattern(n_out // b, hidden // b, density, 2)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        n = sum(lengths)
        self.x, self.g = normal(n, n_in, seed=3), normal(n, n_out, seed=4)
        # Queries, keys and values of about one.
        self.values1 = normal(self.p1.n_blocks, b, b, seed=5) / max(1.0, density * n_in) ** 0.5
        self.values2 = normal(self.p2.n_blocks, b, b, seed=6)
        self.bias1 = normal(3 * hidden, seed=7) if biases else None
        self.bias2 = normal(n_out, seed=8) if biases else None
        self.options = heads, dim**-0.5, p, 1234567890123456789

    @staticmethod
    def pattern(rows: int, cols: int, density: float, seed: int) -> Pattern:
        return pattern(rows, cols, max(1, round(density * rows * cols)), seed=seed)

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        return [None if t is None else t.to(dtype).requires_grad_() for t in (getattr(self, name) for name in NAMES)]

    def forward(self, x: Tensor, values1: Tensor, bias1: Tensor | None, values2: Tensor, bias2: Tensor | None) -> tuple:
        return x, self.offsets, values1, bias1, *self.p1.index, values2, bias2, *self.p2.index, *self.options

    def ours(self, *leaves: Tensor | None) -> Tensor:
        return sparse_attention(*self.forward(*leaves))[0]

    def separate(self, x: Tensor, values1: Tensor, bias1: Tensor | None, values2: Tensor, bias2: Tensor) -> Tensor:
        attended, _ = attention(spmm(x, values1, bias1, *self.p1.index), self.offsets, *self.options)
        return spmm(attended, values2, bias2, *self.p2.index)

    def dense(self, x: Tensor, values1: Tensor, bias1: Tensor | None, values2: Tensor, bias2: Tensor) -> Tensor:
        qkv = linear(x, to_dense(values1, self.p1), bias1)
        return linear(reference_attention(qkv, self.offsets, *self.options)[0], to_dense(values2, self.p2), bias2)

    def run(self, function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = self.leaves(dtype)
        y = function(*leaves)
        present = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(y, present, self.g.to(dtype), materialize_grads=True)
        return [y.detach(), *grads]

    def run_dense(self) -> list[Tensor]:
        """The dense formulas in float32; no autograd, which would keep the probabilities instead of lse."""
        w1, w2 = to_dense(self.values1, self.p1), to_dense(self.values2, self.p2)
        qkv = linear(self.x, w1, self.bias1)
        attended, lse = reference_attention(qkv, self.offsets, *self.options)
        dqkv = reference_attention_backward(self.g @ w2, qkv, attended, lse, self.offsets, *self.options)
        dw1, dw2 = (from_dense(w, p, self.b) for w, p in ((dqkv.T @ self.x, self.p1), (self.g.T @ attended, self.p2)))
        grads = dqkv @ w1, dw1, dqkv.sum(0), dw2, self.g.sum(0)
        missing = 2, 4
        kept = [grad for i, grad in enumerate(grads) if self.bias1 is not None or i not in missing]
        return [linear(attended, w2, self.bias2), *kept]

    def check(self) -> None:
        runs = self.run(self.ours), self.run_dense(), self.run(self.dense, torch.float64)
        for i, (ours, dense, exact) in enumerate(zip(*runs, strict=True)):
            assert_as_good_as_dense(ours, dense, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)

    def backward(self, *needed: bool) -> tuple:
        """Arguments of the gradient's operator."""
        x, values1, bias1, values2, bias2 = (None if t is None else t.detach() for t in self.leaves())
        _, lse, attended = sparse_attention(*self.forward(x, values1, bias1, values2, bias2))
        saved = self.g, x, lse, attended, self.offsets
        return *saved, values1, bias1, *self.p1.index, values2, *self.p2.index, *self.options, *(needed or [True] * 5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("b", BLOCKS)
def test_values_and_gradients(b: int, lengths: list[int], p: float, isa: str) -> None:
    Problem(b, lengths, p=p).check()


@pytest.mark.parametrize(("heads", "dim", "n_in", "n_out"), [(1, 16, 16, 16), (3, 48, 32, 16), (5, 32, 96, 160)])
@pytest.mark.parametrize("b", [1, 4, 16])
def test_shapes(b: int, heads: int, dim: int, n_in: int, n_out: int, isa: str, threads: int) -> None:
    Problem(b, [20, 7, 33], heads, dim, n_in=n_in, n_out=n_out, p=0.1).check()


@pytest.mark.parametrize("b", [1, 4, 16, 32])
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_empty_and_full_rows(b: int, density: float, isa: str) -> None:
    Problem(b, [9, 30], density=density).check()


def test_a_long_sequence(isa: str) -> None:
    Problem(16, [700, 3], 1, p=0.1).check()


@pytest.mark.parametrize("b", [1, 4, 16])
def test_strided_input_without_biases(b: int) -> None:
    problem = Problem(b, [20, 11], biases=False)
    problem.x, problem.g = (torch.stack([t, t], dim=-1)[..., 0] for t in (problem.x, problem.g))
    assert not problem.x.is_contiguous()
    problem.check()


@pytest.mark.parametrize(("b", "heads", "dim"), [(4, 3, 20), (8, 2, 12), (32, 2, 16), (3, 2, 24)])
def test_heads_that_the_compiled_kernels_leave_to_the_reference(b: int, heads: int, dim: int) -> None:
    Problem(b, [20, 0, 11], heads, dim, n_in=4 * b, n_out=3 * b, p=0.1).check()


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("b", BLOCKS)
def test_the_separate_operators_drop_the_same(b: int, p: float) -> None:
    problem = Problem(b, [70, 33, 128], p=p)
    exact = problem.run(problem.dense, torch.float64)
    runs = problem.run(problem.ours), problem.run(problem.separate), exact
    for i, (ours, separate, exact) in enumerate(zip(*runs, strict=True)):
        assert_as_good_as_dense(ours, separate, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("b", [1, 4, 16, 32])
def test_same_bits_for_any_number_of_threads(b: int, isa: str) -> None:
    """Of what belongs to tokens; the weights' gradients are sums of one sum a thread, the same for the same number."""
    problem = Problem(b, [50, 0, 3, 128, 70], p=0.1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        first, again = problem.run(problem.ours), problem.run(problem.ours)
        assert all(torch.equal(ours, other) for ours, other in zip(first, again, strict=True))
        results.append((*sparse_attention(*problem.forward(*problem.leaves())), first[1]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_no_number_stays_in_its_sequence(isa: str) -> None:
    problem = Problem(16, [20, 33])
    problem.x[3, 40] = torch.nan
    y, dx, *_ = problem.run(problem.ours)
    assert y[:20].isnan().any() and not y[20:].isnan().any()
    assert dx[:20].isnan().any() and not dx[20:].isnan().any()


@pytest.mark.parametrize("needed", range(1, 32))
def test_only_needed_gradients(needed: int, isa: str) -> None:
    problem = Problem(4, [20, 5], 1, 16, n_in=8, n_out=8)
    expected = problem.run(problem.ours)[1:]
    leaves = problem.leaves()
    wanted = [i for i in range(5) if needed >> i & 1]
    arguments = [leaf if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    grads = torch.autograd.grad(problem.ours(*arguments), [leaves[i] for i in wanted], problem.g)
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, expected[i])


def test_no_array_of_queries_keys_and_values() -> None:
    problem = Problem(4, [100, 200], density=0.1)
    with LargestTensor() as largest:
        problem.run(problem.ours)
    assert largest.elements == 300 * 128


@pytest.mark.parametrize(("b", "dim"), [(3, 6), (4, 8), (4, 16)])
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck(b: int, dim: int, biases: bool) -> None:
    problem = Problem(b, [4, 7], 2, dim, n_in=3 * b, n_out=2 * b, biases=biases, p=0.1)
    torch.library.opcheck(torch.ops.regrow.sparse_attention.default, problem.forward(*problem.leaves()))
    operator = torch.ops.regrow.sparse_attention_backward.default
    torch.library.opcheck(operator, problem.backward())
    torch.library.opcheck(operator, problem.backward(False, True, False, True, False))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_the_reference(p: float) -> None:
    problem = Problem(2, [3, 0, 4], 2, 2, n_in=4, n_out=4, p=p)
    assert torch.autograd.gradcheck(problem.ours, problem.leaves(torch.float64))


def test_reference_dtypes() -> None:
    problem = Problem(16, [5, 9], p=0.1)
    exact = problem.dense(*problem.leaves(torch.float64)).detach()
    torch.testing.assert_close(problem.ours(*problem.leaves(torch.float64)).detach(), exact)
    low = problem.leaves(torch.bfloat16)
    y, lse, attended = sparse_attention(*problem.forward(*low))
    assert (y.dtype, lse.dtype, attended.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert_as_good_as_dense(y.detach(), problem.dense(*low).detach(), exact)
    assert all(grad.dtype is torch.bfloat16 for grad in problem.run(problem.ours, torch.bfloat16))


def test_there_is_a_first_derivative_only() -> None:
    problem = Problem(4, [6], 1, 16)
    leaves = problem.leaves()
    [dx] = torch.autograd.grad(problem.ours(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RegrowError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dim", [8, 16])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("array", [0, 1, 2])
def test_bad_indices_are_named(array: int, which: int, dim: int) -> None:
    problem = Problem(4, [6], 2, dim)
    backward = list(problem.backward())
    position = (7, 11)[which] + array
    name = ("row_ptr", "col_idx", "slot")[array] + str(which + 1)
    forward = list(problem.forward(*problem.leaves()))
    for bad in (-1, 1000000):
        broken = backward[position].clone()
        broken[-1] = bad
        backward[position] = forward[position - 3 + which] = broken
        with pytest.raises(RegrowError, match=name):
            sparse_attention(*forward)
        with pytest.raises(RegrowError, match=name):
            torch.ops.regrow.sparse_attention_backward(*backward)


@pytest.mark.parametrize("dim", [8, 16])
@pytest.mark.parametrize("content", [[1, 6], [0, 5], [0, 7], [0, 4, 2, 6], [0, -1, 6], [0, 2147483647, 6], [0]])
def test_bad_offsets_are_named(content: list[int], dim: int) -> None:
    problem = Problem(4, [6], 2, dim)
    backward = problem.backward()
    problem.offsets = torch.tensor(content, dtype=torch.int32)
    with pytest.raises(RegrowError, match="offsets"):
        problem.ours(*problem.leaves())
    with pytest.raises(RegrowError, match="offsets"):
        torch.ops.regrow.sparse_attention_backward(*backward[:4], problem.offsets, *backward[5:])


def test_slots_named_twice() -> None:
    backward = list(Problem(4, [6], 1, 16, density=1.0).backward())
    for position, name in ((9, "slot1"), (13, "slot2")):
        broken = list(backward)
        broken[position] = broken[position].clamp(min=1)
        with pytest.raises(RegrowError, match=f"{name} is not a permutation"):
            torch.ops.regrow.sparse_attention_backward(*broken)


def test_bad_tensors_are_named() -> None:
    problem = Problem(4, [6], 2, 16)
    good = dict(zip(NAMES, problem.leaves(), strict=True))
    for name, bad, match in (
        ("x", problem.x[:, 1:], "x is"),
        ("x", problem.x.long(), "x is torch.int64"),
        ("values1", problem.values1.double(), "values1 is"),
        ("values1", problem.values1[1:], "col_idx1 has"),
        ("values2", problem.values2[:, 1:], "values2 must be"),
        ("values2", problem.values2[:, :2, :2], "values1 has blocks of 4"),
        ("bias1", problem.bias1[1:], "bias1 is"),
        ("bias2", problem.bias2[1:], "bias2 is"),
    ):
        with pytest.raises(RegrowError, match=match):
            problem.ours(*{**good, name: bad}.values())
    backward = problem.backward()
    for position, name in ((0, "g"), (2, "lse"), (3, "attended")):
        for bad in (backward[position][1:], backward[position].double()):
            broken = [bad if i == position else argument for i, argument in enumerate(backward)]
            with pytest.raises(RegrowError, match=f"{name} is"):
                torch.ops.regrow.sparse_attention_backward(*broken)
    offsets = problem.offsets
    for problem.offsets in (offsets.long(), offsets[None], offsets[:0]):
        with pytest.raises(RegrowError, match="offsets must be"):
            problem.ours(*good.values())
    problem.offsets = offsets
    for options, match in (
        ((0, 1.0, 0.0, 0), "heads is 0"),
        ((5, 1.0, 0.0, 0), "row_ptr1"),
        ((2, 1.0, 1.0, 0), "p is"),
    ):
        problem.options = options
        with pytest.raises(RegrowError, match=match):
            problem.ours(*good.values())
