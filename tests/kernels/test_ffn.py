"""Two products and the GELU between them as one operator: values, gradients, and what else it promises."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from regrow.errors import RegrowError
from regrow.kernels import cpu, ffn

from ..allocations import LargestTensor
from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense
from .forking import in_forked_child, needs_fork
from .problems import Pattern, normal, pattern, to_dense

BLOCKS = [1, 2, 4, 8, 16, 32, 64]
NAMES = ("x", "values1", "bias1", "values2", "bias2")


class Problem:
    """Two weights, ``n_in -> hidden -> n_out`` blocks, of which a share exists, and tokens."""

    def __init__(
        self, b: int, n_in: int, hidden: int, n_out: int, n: int, density: float = 0.25, biases: bool = True
    ) -> None:
        self.b = b
        self.p1 = self.pattern(hidden, n_in, density, 1)
        self.p2 = self.pattern(n_out, hidden, density, 2)
        self.x, self.g = normal(n, n_in * b, seed=3), normal(n, n_out * b, seed=4)
        # Hidden activations of about one, where the GELU bends.
        self.values1 = normal(self.p1.n_blocks, b, b, seed=5) / max(1.0, density * n_in * b) ** 0.5
        self.values2 = normal(self.p2.n_blocks, b, b, seed=6)
        self.bias1 = normal(hidden * b, seed=7) if biases else None
        self.bias2 = normal(n_out * b, seed=8) if biases else None

    @staticmethod
    def pattern(rows: int, cols: int, density: float, seed: int) -> Pattern:
        return pattern(rows, cols, max(1, round(density * rows * cols)), seed=seed)

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        return [None if t is None else t.to(dtype).requires_grad_() for t in (getattr(self, name) for name in NAMES)]

    def ours(self, x: Tensor, values1: Tensor, bias1: Tensor | None, values2: Tensor, bias2: Tensor | None) -> Tensor:
        return ffn(x, values1, bias1, *self.p1.index, values2, bias2, *self.p2.index)

    def dense(self, x: Tensor, values1: Tensor, bias1: Tensor | None, values2: Tensor, bias2: Tensor | None) -> Tensor:
        return linear(gelu(linear(x, to_dense(values1, self.p1), bias1)), to_dense(values2, self.p2), bias2)

    def run(self, function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = self.leaves(dtype)
        y = function(*leaves)
        grads = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], self.g.to(dtype))
        return [y.detach(), *grads]

    def check(self) -> None:
        runs = self.run(self.ours), self.run(self.dense), self.run(self.dense, torch.float64)
        for i, (ours, dense, exact) in enumerate(zip(*runs, strict=True)):
            assert_as_good_as_dense(ours, dense, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("n", [0, 1, 7, 63, 200])
@pytest.mark.parametrize("b", BLOCKS)
def test_values_and_gradients(b: int, n: int, isa: str, threads: int) -> None:
    width = 83 // b if b < 16 else 5
    Problem(b, width - 2, width + 2, width, n).check()


@pytest.mark.parametrize("b", BLOCKS)
def test_several_tiles_and_slabs(b: int, isa: str) -> None:
    """More tokens and hidden features than are worked on at once."""
    Problem(b, 128 // b, 3072 // b, 64 // b, 403, density=0.1).check()


@pytest.mark.parametrize(("n_in", "hidden", "n_out"), [(1, 1, 1), (1, 9, 1), (9, 1, 9), (3, 8, 2)])
@pytest.mark.parametrize("density", [0.01, 1.0])
@pytest.mark.parametrize("b", [1, 4, 16, 32])
def test_awkward_patterns(b: int, density: float, n_in: int, hidden: int, n_out: int, isa: str) -> None:
    Problem(b, n_in, hidden, n_out, 33, density).check()


@pytest.mark.parametrize("b", [1, 4, 16])
def test_strided_input_without_biases(b: int) -> None:
    problem = Problem(b, 6, 10, 5, 70, biases=False)
    problem.x, problem.g = (torch.stack([t, t], dim=-1)[..., 0] for t in (problem.x, problem.g))
    assert not problem.x.is_contiguous()
    problem.check()


def test_the_activation_alone_everywhere(isa: str) -> None:
    """Through weights of one, so that the input of the activation is ours to choose; a short stretch at a time."""
    h = torch.linspace(-8, 16, 24 * 500)
    index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    one = torch.ones(1, 1, 1)
    ours = ffn(h[:, None], one, None, *index, one, None, *index).squeeze(1)
    exact = gelu(h.double())
    # Of the tail no more is asked than the rounding of what the next product adds it to.
    assert ((ours - exact).abs() <= 2e-6 + 3e-7 * exact.abs()).all()


def test_the_activation_of_what_is_huge_or_no_number(isa: str) -> None:
    h = torch.tensor([0.0, 1e-38, 1e30, -1e30, torch.inf, torch.nan])
    index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [0], [0])]
    one = torch.ones(1, 1, 1)
    y = ffn(h[:, None], one, None, *index, one, None, *index).squeeze(1)
    torch.testing.assert_close(y, torch.tensor([0.0, 5e-39, 1e30, 0.0, torch.inf, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("b", [1, 4, 16, 32])
def test_same_bits_twice(b: int, isa: str, threads: int) -> None:
    problem = Problem(b, 96 // b, 128 // b, 64 // b, 500)
    for ours, again in zip(problem.run(problem.ours), problem.run(problem.ours), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("needed", range(1, 32))
def test_only_needed_gradients(needed: int, isa: str) -> None:
    problem = Problem(4, 3, 5, 2, 20)
    expected = problem.run(problem.ours)[1:]
    leaves = problem.leaves()
    wanted = [i for i in range(5) if needed >> i & 1]
    arguments = [leaf if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    grads = torch.autograd.grad(problem.ours(*arguments), [leaves[i] for i in wanted], problem.g)
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, expected[i])


def test_nothing_of_the_hidden_width_is_allocated() -> None:
    problem = Problem(4, 8, 64, 8, 300, density=0.1)
    with LargestTensor() as largest:
        problem.run(problem.ours)
    assert largest.elements == 300 * 32


@pytest.mark.parametrize("b", [1, 3, 4, 16])
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck(b: int, biases: bool) -> None:
    problem = Problem(b, 3, 5, 2, 6, biases=biases)
    x, values1, bias1, values2, bias2 = problem.leaves()
    forward = (x, values1, bias1, *problem.p1.index, values2, bias2, *problem.p2.index)
    torch.library.opcheck(torch.ops.regrow.ffn.default, forward)
    x, values1, bias1, values2 = (None if t is None else t.detach() for t in (x, values1, bias1, values2))
    for needed in ([True] * 5, [False, True, False, True, False]):
        backward = (problem.g, x, values1, bias1, *problem.p1.index, values2, *problem.p2.index, *needed)
        torch.library.opcheck(torch.ops.regrow.ffn_backward.default, backward)


@pytest.mark.parametrize("b", [2, 3])
def test_gradcheck_of_the_reference(b: int) -> None:
    problem = Problem(b, 3, 4, 2, 3)
    assert torch.autograd.gradcheck(problem.ours, problem.leaves(torch.float64))


def test_reference_dtypes() -> None:
    problem = Problem(3, 3, 5, 2, 9)
    exact = problem.dense(*problem.leaves(torch.float64))
    torch.testing.assert_close(problem.ours(*problem.leaves(torch.float64)), exact)
    low = problem.leaves(torch.bfloat16)
    assert_as_good_as_dense(problem.ours(*low).detach(), problem.dense(*low).detach(), exact.detach())


def test_no_hidden_features_at_all() -> None:
    problem = Problem(4, 3, 1, 2, 5)
    none, index = torch.empty(0, 4, 4), [torch.tensor(i, dtype=torch.int32) for i in ([0], [], [])]
    index2 = [torch.zeros(3, dtype=torch.int32), *index[1:]]
    y = ffn(problem.x, none, None, *index, none, problem.bias2, *index2)
    assert torch.equal(y, problem.bias2.expand(5, 8))


def test_there_is_a_first_derivative_only() -> None:
    problem = Problem(4, 3, 5, 2, 6)
    leaves = problem.leaves()
    [dx] = torch.autograd.grad(problem.ours(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RegrowError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("b", [3, 4])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("array", [0, 1, 2])
def test_bad_indices_are_named(array: int, which: int, b: int) -> None:
    problem = Problem(b, 3, 5, 2, 6)
    indices = [list(problem.p1.index), list(problem.p2.index)]
    name = ("row_ptr", "col_idx", "slot")[array] + str(which + 1)
    for bad in (-1, 1000):
        indices[which][array] = indices[which][array].clone()
        indices[which][array][-1] = bad
        arrays = problem.x, problem.values1, None, *indices[0], problem.values2
        with pytest.raises(RegrowError, match=name):
            ffn(*arrays, None, *indices[1])
        with pytest.raises(RegrowError, match=name):
            torch.ops.regrow.ffn_backward(problem.g, *arrays, *indices[1], *[True] * 5)


def test_indices_out_of_order_and_slots_named_twice() -> None:
    problem = Problem(4, 3, 5, 2, 6, density=1.0)
    row_ptr, col_idx, slot = problem.p2.index
    first, second = (problem.x, problem.values1, None, *problem.p1.index, problem.values2), (row_ptr, col_idx.flip(0))
    with pytest.raises(RegrowError, match="col_idx2 decreases"):
        ffn(*first, None, *second, slot)
    with pytest.raises(RegrowError, match="slot2 is not a permutation"):
        torch.ops.regrow.ffn_backward(problem.g, *first, row_ptr, col_idx, slot.clamp(min=1), *[True] * 5)


def test_bad_tensors_are_named() -> None:
    problem = Problem(4, 3, 5, 2, 6)
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
            problem.ours(**{**good, name: bad})
    rest = problem.x, problem.values1, None, *problem.p1.index, problem.values2, *problem.p2.index, *[True] * 5
    with pytest.raises(RegrowError, match="g is"):
        torch.ops.regrow.ffn_backward(problem.g[1:], *rest)
    index1 = [problem.p1.index[0].long(), *problem.p1.index[1:]]
    with pytest.raises(RegrowError, match="row_ptr1 must be"):
        ffn(problem.x, problem.values1, None, *index1, problem.values2, None, *problem.p2.index)


@needs_fork
def test_one_thread_works_in_a_forked_child() -> None:
    problem = Problem(4, 3, 5, 2, 60)

    def compute() -> float:
        return sum(float(t.sum()) for t in problem.run(problem.ours))

    compute()  # the parent's thread pool now exists
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = compute()
    torch.set_num_threads(before)
    assert "ffn" in dir(cpu.native())
    assert in_forked_child(compute) == expected
