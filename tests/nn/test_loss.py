"""The fused classifier loss against the two operations it replaces."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regrow.errors import RegrowError
from regrow.kernels import cpu
from regrow.nn.loss import linear_cross_entropy
from regrow.nn.tied import SharedGradient, tied_embedding
from tolerances import GRADIENT_FACTOR, assert_as_good_as_dense

SIZES = [(7, 5, 3), (1, 1, 1), (33, 16, 17), (20, 64, 1000), (3, 8, 4100)]
"""Rows, features, classes."""


def problem(n: int, features: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n * classes)
    x, weight, bias = (
        torch.randn(*shape, generator=draw) for shape in ((n, features), (classes, features), (classes,))
    )
    return [x.to(dtype), weight.to(dtype), bias.to(dtype), torch.randint(classes, (n,), generator=draw)]


def results(loss, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: float) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    value = loss(leaves[0], leaves[1], leaves[2] if bias is not None else None, targets)
    (value * factor).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int | None = None) -> Tensor:
    """So many rows at a time: of a single one torch's products round otherwise, on one thread most of all."""
    sizes = [len(part) for part in targets.tensor_split(-(-len(targets) // (rows or len(targets))))]
    parts = zip(x.split(sizes), targets.split(sizes), strict=True)
    losses = [F.cross_entropy(F.linear(part, weight, bias), wanted, reduction="sum") for part, wanted in parts]
    return torch.stack(losses).sum() / len(targets)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_are_as_good_as_the_plain_ones(size, rows, with_bias, isa) -> None:
    x, weight, bias, targets = problem(*size)
    bias = bias if with_bias else None
    ours = results(lambda *a: linear_cross_entropy(*a, rows=rows), x, weight, bias, targets, 0.7)
    dense = results(lambda *a: plain(*a, rows=rows), x, weight, bias, targets, 0.7)
    exact = results(plain, x.double(), weight.double(), None if bias is None else bias.double(), targets, 0.7)
    for a, d, e in zip(ours, dense, exact, strict=True):
        assert_as_good_as_dense(a, d, e, GRADIENT_FACTOR)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    x = torch.tensor([[1e4, 0.0], [-1e4, 1.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 2])
    loss = linear_cross_entropy(x, weight, None, targets)
    loss.backward()
    torch.testing.assert_close(loss, plain(x, weight, None, targets))
    assert x.grad is not None and x.grad.isfinite().all()


def test_other_dtypes_and_layouts_take_the_plain_road() -> None:
    x, weight, bias, targets = problem(9, 6, 11, torch.float64)
    ours = results(lambda *a: linear_cross_entropy(*a, rows=4), x, weight, bias, targets, 1.0)
    for a, e in zip(ours, results(plain, x, weight, bias, targets, 1.0), strict=True):
        torch.testing.assert_close(a, e)
    wide = problem(9, 12, 11)
    x, weight = wide[0][:, ::2], wide[1].t().contiguous().t()[:, ::2]
    torch.testing.assert_close(linear_cross_entropy(x, weight, wide[2], wide[3]), plain(x, weight, wide[2], wide[3]))


def test_nothing_to_predict_costs_nothing() -> None:
    x, weight, bias, targets = problem(0, 4, 6)
    loss, *gradients = results(linear_cross_entropy, x, weight, bias, targets, 1.0)
    assert loss == 0 and all(not gradient.any() for gradient in gradients)


def test_threads_do_not_change_the_rows(threads: int) -> None:
    """Sums over rows are cut by thread; each row's own loss and gradient are not."""
    _, weight, _, targets = problem(8, 16, 300)
    logits = weight[:8, :16].repeat(1, 19)[:, :300].contiguous()
    one = logits.clone()
    losses, _ = cpu.cross_entropy_(one, None, targets, 1.0)
    torch.set_num_threads(1)
    other = logits.clone()
    expected, _ = cpu.cross_entropy_(other, None, targets, 1.0)
    assert torch.equal(losses, expected) and torch.equal(one, other)


def test_without_gradients_the_logits_are_left_alone() -> None:
    x, weight, bias, targets = problem(5, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, bias, targets), plain(x, weight, bias, targets))


def test_only_so_many_rows_of_logits_exist() -> None:
    n, classes, rows = 64, 512, 8
    x, weight, bias, targets = problem(n, 4, classes)
    x.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = linear_cross_entropy(x, weight, bias, targets, rows=rows)
    largest = max(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= rows * classes * 4
    loss.backward()
    assert x.grad is not None
    with pytest.raises(RegrowError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, "x must be"),
        ({"weight": torch.ones(6, 3)}, "weight"),
        ({"bias": torch.ones(5)}, "bias must be"),
        ({"targets": torch.zeros(5)}, "int64"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.tensor([0, 1, 6, 0, 0])}, "targets holds 6"),
        ({"targets": torch.tensor([0, 1, -100, 0, 0])}, "targets holds -100"),
        ({"rows": 0}, "rows must be"),
    ],
)
def test_errors_name_the_argument(change, message) -> None:
    names = dict(zip(("x", "weight", "bias", "targets"), problem(5, 4, 6), strict=True)) | change
    with pytest.raises(RegrowError, match=message):
        linear_cross_entropy(**names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 0, 3])
def test_a_tied_weight_has_one_gradient(dtype: torch.dtype, padding_idx: int | None) -> None:
    _, weight, bias, _ = problem(1, 40, 30, dtype)
    draw = torch.Generator().manual_seed(5)
    ids, targets = (torch.randint(30, (50,), generator=draw) for _ in range(2))
    grads = []
    for tied in (True, False):
        leaf, shared = weight.clone().requires_grad_(), SharedGradient()
        for _ in range(2):  # accumulated, as over two batches
            if tied:
                x = tied_embedding(ids, leaf, shared, padding_idx)
                loss = linear_cross_entropy(x.tanh(), leaf, bias, targets, shared=shared)
            else:
                loss = plain(F.embedding(ids, leaf, padding_idx).tanh(), leaf, bias, targets)
            (loss * 0.5).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_a_tied_embedding_without_its_loss_has_the_ordinary_gradient() -> None:
    weight = torch.randn(9, 4, requires_grad=True)
    ids = torch.tensor([2, 2, 7])
    tied_embedding(ids, weight, SharedGradient()).sum().backward()
    assert weight.grad is not None and weight.grad.sum(1).tolist() == [0, 0, 8, 0, 0, 0, 0, 4, 0]


def test_rows_outside_the_weight_are_refused() -> None:
    with pytest.raises(RegrowError, match="rows holds 9"):
        cpu.add_rows_(torch.zeros(9, 4), torch.tensor([1, 9]), torch.ones(2, 4))
