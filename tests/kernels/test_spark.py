"""A feed-forward half with few active units: values, gradients, and what else it promises."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from regrow.errors import RegrowError
from regrow.kernels import cpu, spark_ffn
from regrow.kernels.gather import Lists, gather_dot, gather_sum, top_columns, transposed
from regrow.kernels.spark import _active
from regrow.nn.spark import quantile_of, statistical_top_k

from ..allocations import LargestTensor
from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense, assert_same_numbers
from .problems import normal

NAMES = ("x", "gate", "gate_bias", "up", "down", "bias")


class Problem:
    """``n`` tokens of ``width`` features through ``hidden`` units to ``out`` features."""

    def __init__(
        self, n: int, width: int, r: int, hidden: int, out: int, keep: float = 0.08, biases: bool = True
    ) -> None:
        self.quantile = quantile_of(keep)
        self.x, self.g = normal(n, width, seed=1), normal(n, out, seed=2)
        self.gate, self.up = normal(hidden, r, seed=3) / r**0.5, normal(hidden, width - r, seed=4) / (width - r) ** 0.5
        self.down = normal(hidden, out, seed=5)
        self.gate_bias = normal(hidden, seed=6) if biases else None
        self.bias = normal(out, seed=7) if biases else None

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        return [None if t is None else t.to(dtype).requires_grad_() for t in (getattr(self, name) for name in NAMES)]

    def ours(self, *leaves: Tensor | None) -> Tensor:
        return spark_ffn(*leaves, self.quantile)

    def dense(
        self,
        x: Tensor,
        gate: Tensor,
        gate_bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """With autograd's own gradients, of the threshold too."""
        r = gate.shape[1]
        z = linear(x[:, :r], gate, gate_bias)
        off = z - z.mean(1, keepdim=True)
        over = torch.relu(off - self.quantile * off.square().mean(1, keepdim=True).sqrt())
        return linear(gelu(over) * linear(x[:, r:], up), down.T, bias)

    def run(self, function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = self.leaves(dtype)
        y = function(*leaves)
        grads = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], self.g.to(dtype))
        return [y.detach(), *grads]

    def check(self) -> None:
        runs = self.run(self.ours), self.run(self.dense), self.run(self.dense, torch.float64)
        for i, (ours, dense, exact) in enumerate(zip(*runs, strict=True)):
            assert_as_good_as_dense(ours, dense, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("n", [0, 1, 7, 200])
@pytest.mark.parametrize(("width", "r", "hidden", "out"), [(64, 32, 256, 64), (96, 40, 300, 130), (7, 3, 11, 5)])
def test_values_and_gradients(n: int, width: int, r: int, hidden: int, out: int, isa: str, threads: int) -> None:
    Problem(n, width, r, hidden, out).check()


@pytest.mark.parametrize(("width", "r", "hidden", "out"), [(2, 1, 2, 1), (33, 32, 3, 1), (33, 1, 40, 17)])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.99])
def test_awkward_shapes(width: int, r: int, hidden: int, out: int, keep: float, isa: str) -> None:
    """Numbers from the right places: the error of one GELU is not lost in so few sums."""
    problem = Problem(13, width, r, hidden, out, keep)
    for ours, exact in zip(problem.run(problem.ours), problem.run(problem.dense, torch.float64), strict=True):
        assert_same_numbers(ours, exact)


def test_several_slabs(isa: str) -> None:
    """More units and more tokens than are read together, some tables worth a copy and some not."""
    Problem(1100, 20, 12, 1500, 37, keep=0.02).check()


def test_strided_input_without_biases() -> None:
    problem = Problem(50, 24, 10, 80, 12, biases=False)
    problem.x, problem.g = (torch.stack([t, t], dim=-1)[..., 0] for t in (problem.x, problem.g))
    assert not problem.x.is_contiguous()
    problem.check()


def test_gradcheck_of_the_reference() -> None:
    problem = Problem(3, 6, 2, 9, 4, keep=0.3)
    assert torch.autograd.gradcheck(problem.ours, problem.leaves(torch.float64))


def test_reference_dtypes() -> None:
    problem = Problem(9, 12, 6, 40, 8)
    exact = problem.run(problem.dense, torch.float64)
    for ours, dense in zip(problem.run(problem.ours, torch.float64), exact, strict=True):
        torch.testing.assert_close(ours, dense)
    low = problem.leaves(torch.bfloat16)
    assert_as_good_as_dense(problem.ours(*low).detach(), problem.dense(*low).detach(), exact[0])


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(biases: bool, dtype: torch.dtype) -> None:
    problem = Problem(6, 10, 4, 30, 7, biases=biases)
    leaves = problem.leaves(dtype)
    torch.library.opcheck(torch.ops.regrow.spark_ffn.default, (*leaves, problem.quantile, True))
    leaves = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.regrow.spark_ffn.default, (*leaves, problem.quantile, False))
    x, gate, gate_bias, up, down, _ = leaves
    z = linear(x[:, :4], gate, gate_bias)
    for needed in ([True] * 6, [False, True, False] * 2):
        arguments = problem.g.to(dtype), x, z, gate, gate_bias, up, down, problem.quantile, *needed
        torch.library.opcheck(torch.ops.regrow.spark_ffn_backward.default, arguments)


@pytest.mark.parametrize("needed", range(1, 64))
def test_only_needed_gradients(needed: int) -> None:
    problem = Problem(20, 10, 4, 30, 7)
    expected = problem.run(problem.ours)[1:]
    leaves = problem.leaves()
    wanted = [i for i in range(6) if needed >> i & 1]
    arguments = [leaf if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    grads = torch.autograd.grad(problem.ours(*arguments), [leaves[i] for i in wanted], problem.g)
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, expected[i])


def test_the_bits_do_not_depend_on_threads(isa: str) -> None:
    """Of what is ours; the dense product of the gates is small enough here to be done by one thread."""
    problem, before = Problem(64, 40, 8, 200, 24), torch.get_num_threads()
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(problem.run(problem.ours))
    torch.set_num_threads(before)
    for other in runs[1:]:
        for ours, again in zip(runs[0], other, strict=True):
            assert torch.equal(ours, again)


def test_about_the_share_is_active(isa: str) -> None:
    """The published figure: of 3,072 normal numbers 246, with a standard deviation of 9.5."""
    z = normal(2000, 3072, seed=8)
    counts = _active(z, quantile_of(0.08)).lists.ptr.diff().double()
    assert abs(counts.mean() - 246) < 1 and abs(counts.std() - 9.5) < 0.7
    assert torch.equal(counts, (statistical_top_k(z, 0.08) > 0).sum(1).double())


def test_equal_gates_activate_nothing_and_have_a_gradient() -> None:
    """The deviation is 0 there, which nothing is divided by."""
    problem = Problem(5, 8, 4, 16, 6, biases=False)
    problem.gate = torch.zeros_like(problem.gate)
    for result in problem.run(problem.ours):
        assert torch.equal(result, torch.zeros_like(result))


def test_what_is_no_number_comes_through(isa: str) -> None:
    problem = Problem(3, 8, 4, 40, 6)
    problem.x[1, 0] = torch.nan
    y = problem.ours(*problem.leaves())
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_nothing_wider_than_the_gates_is_allocated() -> None:
    problem = Problem(300, 32, 16, 256, 32)
    with LargestTensor() as largest:
        problem.run(problem.ours)
    assert largest.elements == 300 * 256


def test_there_is_a_first_derivative_only() -> None:
    problem = Problem(6, 8, 4, 16, 6)
    leaves = problem.leaves()
    [dx] = torch.autograd.grad(problem.ours(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RegrowError, match="second derivative"):
        dx.sum().backward()


def test_bad_tensors_are_named() -> None:
    problem = Problem(6, 8, 4, 16, 6)
    good = dict(zip(NAMES, problem.leaves(), strict=True))
    for name, bad, match in (
        ("x", problem.x[0], "x is"),
        ("x", problem.x.long(), "x is torch.int64"),
        ("gate", torch.ones(16, 8), "gate is"),
        ("gate", torch.ones(15, 4), "gate_bias is"),
        ("gate_bias", torch.ones(3), "gate_bias is"),
        ("up", problem.up.double(), "up is"),
        ("up", problem.up[1:], "up is"),
        ("down", problem.down[1:], "down is"),
        ("bias", torch.ones(3), "bias is"),
    ):
        with pytest.raises(RegrowError, match=match):
            problem.ours(*(good | {name: bad}).values())
    with pytest.raises(RegrowError, match="quantile"):
        spark_ffn(*good.values(), torch.nan)
    x, gate, gate_bias, up, down, _ = (t.detach() for t in good.values())
    z = linear(x[:, :4], gate, gate_bias)
    for g, gates, match in ((problem.g[1:], z, "g is"), (problem.g, z[:, 1:], "z is")):
        with pytest.raises(RegrowError, match=match):
            torch.ops.regrow.spark_ffn_backward(g, x, gates, gate, gate_bias, up, down, 1.0, *[True] * 6)


# ---- lists --------------------------------------------------------------------------------------------


def lists_of(rows: int, of: int, share: float = 0.3) -> tuple[Lists, Tensor]:
    """And the same as a matrix of zeros and ones."""
    mask = torch.rand(rows, of, generator=torch.Generator().manual_seed(9)) < share
    ptr = torch.zeros(rows + 1, dtype=torch.int32)
    ptr[1:] = mask.sum(1).cumsum(0)
    return Lists(ptr, mask.nonzero()[:, 1].int(), of), mask.double()


@pytest.mark.parametrize("rows", [1, 40])  # few lists read the table where it lies
@pytest.mark.parametrize("width", [1, 16, 31, 300])
def test_products_with_listed_rows(width: int, rows: int, isa: str, threads: int) -> None:
    lists, mask = lists_of(rows, 50)
    table, weights, lead = normal(50, width + 3), normal(len(lists.idx), seed=1), normal(rows, width + 2, seed=2)
    matrix = mask.clone()
    matrix[mask > 0] = weights.double()
    start, out = normal(width, seed=3), torch.full((rows, width + 5), 7.0)
    gather_sum(lists, weights, table, start=start, columns=slice(3, None), out=out, out_at=4)
    exact = matrix @ table[:, 3:].double() + start.double()
    torch.testing.assert_close(out[:, 4 : width + 4].double(), exact, rtol=1e-5, atol=1e-5)
    assert (out[:, :4] == 7).all() and (out[:, width + 4 :] == 7).all()
    table = table[:, :width].contiguous()
    dots = gather_dot(lists, lead, table, lead_at=2).double()
    torch.testing.assert_close(dots, (lead[:, 2:].double() @ table.double().T)[mask > 0], rtol=1e-5, atol=1e-5)


def test_lists_turned_over(threads: int) -> None:
    lists, mask = lists_of(30, 50)
    numbers = [normal(len(lists.idx), seed=i) for i in range(3)]
    turned, moved, sums = transposed(lists, numbers)
    assert torch.equal(turned.ptr.diff().long(), mask.sum(0).long())
    assert torch.equal(turned.idx.long(), mask.T.nonzero()[:, 1]) and turned.of == 30
    for number, after in zip(numbers, moved, strict=True):
        matrix = torch.zeros(30, 50)
        matrix[mask > 0] = number
        assert torch.equal(after, matrix.T[mask.T > 0])
    torch.testing.assert_close(sums, matrix.sum(0))


@pytest.mark.parametrize("bad", [-1, 50])
def test_lists_are_checked_before_anything_is_read(bad: int) -> None:
    lists, _ = lists_of(4, 50)
    idx, ptr = lists.idx.clone(), lists.ptr.clone()
    idx[3], ptr[2] = bad, bad * 1000
    numbers = torch.ones(len(idx))
    for broken, match in ((lists._replace(idx=idx), "idx holds"), (lists._replace(ptr=ptr), "ptr")):
        with pytest.raises(RegrowError, match=match):
            gather_sum(broken, numbers, torch.ones(50, 8))
        with pytest.raises(RegrowError, match=match):
            gather_dot(broken, torch.ones(4, 8), torch.ones(50, 8))
        with pytest.raises(RegrowError, match=match):
            transposed(broken, [numbers] * 3)


@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("width", [1, 15, 64, 777])
def test_columns_with_the_greatest_products(width: int, with_norms: bool, isa: str, threads: int) -> None:
    x, norms = normal(9, width), normal(width, seed=1).abs() if with_norms else None
    x[0], x[1, ::2] = 0.0, 1.0  # equals
    scores = x.abs() if norms is None else x.abs() * norms
    for keep in {0, 1, width // 2, width}:
        lists, numbers = top_columns(x, norms, keep)
        idx = lists.idx.view(9, keep).long()
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
        assert torch.equal(idx, best) and torch.equal(numbers.view(9, keep), x.gather(1, best))


def test_what_is_no_number_is_kept() -> None:
    lists, _ = top_columns(torch.tensor([[1.0, torch.nan, torch.inf, 2.0]]), None, 2)
    assert lists.idx.tolist() == [1, 2]


def test_lists_and_gates_must_belong_together() -> None:
    active = _active(normal(4, 20), 0.5)
    z, short = normal(4, 20), torch.empty(3, dtype=torch.int32)
    with pytest.raises(RegrowError, match="ptr ends"):
        cpu.call("spark_select", (z, active.mean, active.lists.ptr, short, torch.empty(3)), 4, 20, 3)
