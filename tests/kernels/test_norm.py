"""Dropout, residual sum and LayerNorm in one operator, against torch's own in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from regrow.errors import RegrowError
from regrow.kernels import dropout_add_norm
from regrow.kernels.dropout import dropout_factors
from regrow.kernels.norm import reference_backward, reference_forward

from ..tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_dense
from .problems import normal

OPS = torch.ops.regrow
EPS, SEED = 1e-12, 77
WIDTHS = [2, 3, 16, 31, 100, 128, 200, 768]


def problem(n: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual, weight, bias."""
    weight, bias = normal(width, seed=3, dtype=dtype) + 1, normal(width, seed=4, dtype=dtype)
    return [normal(n, width, seed=1, dtype=dtype), normal(n, width, seed=2, dtype=dtype) * 2 + 0.5, weight, bias]


def dense(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    h = x * dropout_factors(SEED, *x.shape, p, torch.float64).to(x.dtype)
    return layer_norm(h if residual is None else residual + h, x.shape[1:], weight, bias, EPS)


def check(tensors: list[Tensor | None], p: float, cotangent: Tensor) -> None:
    def run(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        y = dropout_add_norm(*leaves, EPS, p, SEED) if dtype is None else dense(*leaves, p)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent.to(y.dtype))
        return [y.detach(), *grads]

    results = zip(run(None), run(torch.float32), run(torch.float64), strict=True)
    for i, (ours, theirs, exact) in enumerate(results):
        assert_as_good_as_dense(ours, theirs, exact, VALUE_FACTOR if i == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("n", [0, 1, 2, 67, 300])
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients(width: int, n: int, p: float, isa: str) -> None:
    check(problem(n, width), p, normal(n, width, seed=5))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_a_residual(p: float, isa: str, threads: int) -> None:
    x, _, weight, bias = problem(70, 150)
    check([x, None, weight, bias], p, normal(70, 150, seed=5))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_many_rows_are_summed_as_exactly_as_dense(offset: float, isa: str, threads: int) -> None:
    """Also where the mean is far from zero."""
    x, residual, weight, bias = problem(3000, 40)
    check([x, residual + offset, weight, bias], 0.1, normal(3000, 40, seed=5) + 1)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_results_that_outgrow_a_cache(p: float, isa: str) -> None:
    """They are stored around it; one thread has to have enough of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    check(problem(1100, 512), p, normal(1100, 512, seed=5))
    torch.set_num_threads(before)


def test_strided_inputs() -> None:
    x, residual, weight, bias = (torch.stack([t, t], dim=-1)[..., 0] for t in problem(40, 70))
    assert not x.is_contiguous()
    check([x, residual, weight, bias], 0.1, normal(70, 40, seed=5).T)


def test_unaligned_inputs(isa: str) -> None:
    tensors = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in problem(40, 256)]
    assert tensors[0].data_ptr() % 64
    check(tensors, 0.1, normal(40, 256, seed=5))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_any_number_of_threads(p: float, isa: str) -> None:
    """The bits of all gradients, also of those that are summed over rows."""
    tensors, g, before = problem(1111, 200), normal(1111, 200, seed=5), torch.get_num_threads()
    for n in (5, 40, 1111):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [(t[:n] if t.dim() == 2 else t).detach().requires_grad_() for t in tensors]
            y = dropout_add_norm(*leaves, EPS, p, SEED)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, g[:n])])
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1)])
def test_only_some_gradients(needed: tuple[int, ...], p: float) -> None:
    g = normal(33, 48, seed=5)

    def gradients(wanted: tuple[int, ...]) -> dict[int, Tensor]:
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(problem(33, 48))]
        grads = torch.autograd.grad(dropout_add_norm(*leaves, EPS, p, SEED), [leaves[i] for i in wanted], g)
        return dict(zip(wanted, grads, strict=True))

    every = gradients((0, 1, 2, 3))
    for i, grad in gradients(needed).items():
        assert torch.equal(grad, every[i])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradients_that_are_added_to_later(p: float, order: int) -> None:
    """Without dropout the gradients of x and of the residual are one tensor; autograd must not add to one through the
    other. Here both arrive first or last where others are added, at leaves and inside the graph, twice."""
    values = problem(20, 32, torch.float64)
    cotangents = [normal(20, 32, seed=10 + i, dtype=torch.float64) for i in range(3)]

    def run(f: object) -> list[Tensor]:
        a, b, weight, bias = (t.clone().requires_grad_() for t in values)
        for _ in range(2):  # the second pass adds to what the first left in .grad
            x, residual = (a * 2, b * 3) if order else (a, b)
            early = (x * cotangents[1]).sum() + (residual * cotangents[2]).sum()
            y = f(x, residual, weight, bias)
            late = (x * cotangents[2]).sum() + (residual * cotangents[1]).sum()
            ((y * cotangents[0]).sum() + early + late).backward()
            a.grad.mul_(0.5)  # as a clip would
        return [a.grad, b.grad, weight.grad, bias.grad]

    ours = run(lambda *t: dropout_add_norm(*t, EPS, p, SEED))
    for mine, theirs in zip(ours, run(lambda *t: dense(*t, p)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_leaves_own_their_gradients() -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in problem(4, 8))
    dropout_add_norm(x, residual, weight, bias, EPS, 0.0, SEED).sum().backward()
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_one_tensor_as_both_inputs() -> None:
    x, _, weight, bias = problem(6, 20, torch.float64)
    x.requires_grad_()
    for p in (0.0, 0.3):
        grads = [
            torch.autograd.grad(f(x), x, normal(6, 20, seed=5, dtype=torch.float64))[0]
            for f in (
                lambda x, p=p: dropout_add_norm(x, x, weight, bias, EPS, p, SEED),
                lambda x, p=p: dense(x, x, weight, bias, p),
            )
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reference_dtypes(dtype: torch.dtype) -> None:
    tensors = problem(9, 50)
    y = dropout_add_norm(*(t.to(dtype) for t in tensors), EPS, 0.1, SEED)
    low, exact = (dense(*(t.to(dtype).to(d) for t in tensors), 0.1) for d in (dtype, torch.float64))
    assert_as_good_as_dense(y, low, exact)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_reference_is_what_the_kernels_compute(p: float, isa: str) -> None:
    tensors, g = problem(21, 60), normal(21, 60, seed=5)
    y, mean, rstd = OPS.dropout_add_norm(*tensors, EPS, p, SEED)
    for ours, theirs in zip((y, mean, rstd), reference_forward(*tensors, EPS, p, SEED), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    args = g, *tensors[:2], mean, rstd, tensors[2], p, SEED
    for ours, theirs in zip(OPS.dropout_add_norm_backward(*args, True, True), reference_backward(*args), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(p: float, with_residual: bool, dtype: torch.dtype) -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in problem(5, 40, dtype))
    residual = residual if with_residual else None
    torch.library.opcheck(OPS.dropout_add_norm.default, (x, residual, weight, bias, EPS, p, SEED))
    detached = [None if t is None else t.detach() for t in (x, residual, weight, bias)]
    _, mean, rstd = OPS.dropout_add_norm(*detached, EPS, p, SEED)
    for needed in ((True, True), (False, True), (True, False), (False, False)):
        args = normal(5, 40, dtype=dtype), *detached[:2], mean, rstd, detached[2], p, SEED, *needed
        torch.library.opcheck(OPS.dropout_add_norm_backward.default, args)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradcheck(p: float, with_residual: bool) -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in problem(3, 7, torch.float64))
    args = x, residual if with_residual else None, weight, bias
    assert torch.autograd.gradcheck(lambda *t: dropout_add_norm(*t, 1e-5, p, SEED), args)


def test_no_second_derivative() -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in problem(3, 7))
    [dx] = torch.autograd.grad(dropout_add_norm(x, residual, weight, bias, EPS, 0.1, SEED).sum(), x, create_graph=True)
    with pytest.raises(RegrowError, match="second derivative"):
        dx.sum().backward()


def test_bad_tensors_are_named() -> None:
    x, residual, weight, bias = problem(5, 8)
    rest = EPS, 0.1, SEED
    with pytest.raises(RegrowError, match="residual is"):
        dropout_add_norm(x, residual[1:], weight, bias, *rest)
    with pytest.raises(RegrowError, match=r"residual is torch\.float64"):
        dropout_add_norm(x, residual.double(), weight, bias, *rest)
    with pytest.raises(RegrowError, match="weight is"):
        dropout_add_norm(x, residual, weight[1:], bias, *rest)
    with pytest.raises(RegrowError, match="bias is"):
        dropout_add_norm(x, residual, weight, bias[None], *rest)
    with pytest.raises(RegrowError, match="x is"):
        dropout_add_norm(x[0], residual, weight, bias, *rest)
    with pytest.raises(RegrowError, match="H > 0"):
        dropout_add_norm(x[:, :0], residual[:, :0], weight[:0], bias[:0], *rest)
    with pytest.raises(RegrowError, match=r"x is torch\.int64"):
        dropout_add_norm(x.long(), residual, weight, bias, *rest)
    with pytest.raises(RegrowError, match="p is 1"):
        dropout_add_norm(x, residual, weight, bias, EPS, 1.0, SEED)
    with pytest.raises(RegrowError, match="seed is"):
        dropout_add_norm(x, residual, weight, bias, EPS, 0.1, 1 << 64)
    mean = torch.zeros(5)
    with pytest.raises(RegrowError, match="rstd is"):
        OPS.dropout_add_norm_backward(x, x, residual, mean, mean[1:], weight, 0.1, SEED, True, True)
    with pytest.raises(RegrowError, match="g is"):
        OPS.dropout_add_norm_backward(x[1:], x, residual, mean, mean, weight, 0.1, SEED, True, True)
