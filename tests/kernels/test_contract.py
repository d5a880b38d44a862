"""What the operators promise besides their values: differentiability, checks, memory, and a safe fork."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regrow.errors import RegrowError
from regrow.kernels import cpu, sddmm, spmm, spmm_gelu, spmm_t

from ..allocations import LargestTensor
from .forking import in_forked_child, needs_fork
from .problems import normal, pattern

P = pattern(4, 3, 5)


def arguments(
    op: str, b: int, dtype: torch.dtype = torch.float32, n: int = 6, grad: bool = True, *, width: int | None = None
) -> tuple:
    w = width or b
    x, g = normal(n, 3 * w, seed=1, dtype=dtype), normal(n, 4 * b, seed=2, dtype=dtype)
    values, bias = normal(5, b, w, seed=3, dtype=dtype), normal(4 * b, seed=4, dtype=dtype)
    x, g, values, bias = (t.requires_grad_(grad) for t in (x, g, values, bias))
    return {
        "spmm": (x, values, bias, *P.index),
        "spmm_t": (g, values, *P.index, 3 * w),
        "sddmm": (g, x, *P.index, b, False, width),
        "sddmm_with_sum": (g, x, *P.index, b, True, width),
        "spmm_gelu": (x, values, bias, *P.index, True),
    }[op]


def operator(op: str) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.regrow, op.removesuffix("_with_sum"))


@pytest.mark.parametrize(("b", "width"), [(1, None), (3, None), (4, None), (16, None), (16, 1), (3, 1)])
@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm", "sddmm_with_sum", "spmm_gelu"])
def test_opcheck(op: str, b: int, width: int | None) -> None:
    torch.library.opcheck(operator(op).default, arguments(op, b, width=width))


@pytest.mark.parametrize("width", [None, 1])
@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm", "sddmm_with_sum"])
def test_gradcheck(op: str, width: int | None) -> None:
    args = arguments(op, 2, torch.float64, n=3, width=width)
    function = operator(op)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_gelu_has_a_first_derivative_only() -> None:
    args = arguments("spmm_gelu", 2, torch.float64, n=3)[:-1]
    assert torch.autograd.gradcheck(spmm_gelu, args)
    [dx] = torch.autograd.grad(spmm_gelu(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RegrowError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_opcheck_of_the_backward_pass_of_gelu(needed: tuple[bool, bool, bool]) -> None:
    x, values, _, *index = arguments("spmm_gelu", 4, grad=False)
    g, slope = normal(6, 16, seed=2), normal(6, 16, seed=5)
    torch.library.opcheck(torch.ops.regrow.spmm_gelu_backward.default, (g, slope, x, values, *index[:3], *needed))


def test_gelu_keeps_no_slope_where_no_gradient_is_asked_for() -> None:
    x, values, bias, *index = arguments("spmm", 4)
    with Written() as written, torch.no_grad():
        spmm_gelu(x, values, bias, *index)
    assert written.elements == 6 * 16


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, values, bias, *index = arguments("spmm", 4)
    calls = []
    real = cpu.call
    monkeypatch.setattr(cpu, "call", lambda name, *args: (calls.append(name), real(name, *args)))
    spmm(x.detach(), values, bias, *index).sum().backward()
    assert calls == ["spmm", "sddmm"]
    calls.clear()
    spmm(x, values.detach(), bias, *index).sum().backward()
    assert calls == ["spmm", "spmm"]
    calls.clear()
    spmm(x.detach(), values.detach(), bias, *index).sum().backward()
    assert calls == ["spmm"]


class Written(TorchDispatchMode):
    """Adds up the elements of all results."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("b", "width"), [(1, 1), (4, 4), (16, 16), (16, 1)])
def test_nothing_dense_is_allocated(b: int, width: int, dtype: torch.dtype) -> None:
    p = pattern(256 // b, 512 // width, 256 * 512 // (20 * b * width))
    x = normal(4, 512, dtype=dtype).requires_grad_()
    values = normal(p.n_blocks, b, width, dtype=dtype).requires_grad_()
    bias = normal(256, dtype=dtype).requires_grad_()
    with LargestTensor() as largest:
        spmm(x, values, bias, *p.index).square().sum().backward()
    assert largest.elements >= values.numel()
    assert largest.elements < 256 * 512


BAD = [
    ("row_ptr", 0, [1, 2, 3, 4, 5]),
    ("row_ptr", 0, [0, 3, 2, 4, 5]),
    ("row_ptr", 0, [0, 1, 2, 3, 4]),
    ("row_ptr", 0, [0, 1, 2, 3, 99]),
    ("col_idx", 1, [0, 1, 2, 3, 0]),
    ("col_idx", 1, [0, -1, 2, 0, 0]),
    ("col_idx", 1, [0, -2147483648, 2, 0, 0]),
    ("slot", 2, [0, 1, 2, 3, 5]),
    ("slot", 2, [-1, 1, 2, 3, 4]),
    ("slot", 2, [0, 1, 2, 3, 1000000]),
]


@pytest.mark.parametrize(("b", "width"), [(1, None), (3, None), (4, None), (16, None), (16, 1), (3, 1)])
@pytest.mark.parametrize(("name", "position", "content"), BAD)
def test_bad_indices_are_named(name: str, position: int, content: list[int], b: int, width: int | None) -> None:
    index = list(P.index)
    index[position] = torch.tensor(content, dtype=torch.int32)
    for op in ("spmm", "spmm_t", "sddmm", "spmm_gelu"):
        args = list(arguments(op, b, grad=False, width=width))
        first = next(i for i, a in enumerate(args) if a is P.index[0])
        args[first : first + 3] = index
        with pytest.raises(RegrowError, match=name):
            getattr(torch.ops.regrow, op)(*args)


@pytest.mark.parametrize(("b", "width"), [(4, 4), (16, 1)])
def test_slot_named_twice(b: int, width: int) -> None:
    args = list(arguments("sddmm", b, grad=False, width=width))
    args[4] = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)
    with pytest.raises(RegrowError, match="slot"):
        sddmm(*args[:6], width)


def test_bad_tensors_are_named() -> None:
    x, values, bias, *index = arguments("spmm", 4)
    g = normal(6, 16)
    with pytest.raises(RegrowError, match=r"values is torch\.float64"):
        spmm(x, values.double(), bias, *index)
    with pytest.raises(RegrowError, match="bias is"):
        spmm(x, values, bias[1:], *index)
    with pytest.raises(RegrowError, match="x is"):
        spmm(x[:, 1:], values, bias, *index)
    for bad in (values[:, 1:], values[:, :0, :0]):
        with pytest.raises(RegrowError, match="values must be"):
            spmm(x, bad, bias, *index)
    with pytest.raises(RegrowError, match="col_idx must be"):
        spmm(x, values, bias, index[0], index[1].long(), index[2])
    with pytest.raises(RegrowError, match="slot has 4 entries"):
        spmm(x, values, bias, *index[:2], index[2][1:])
    with pytest.raises(RegrowError, match="row_ptr"):
        spmm(x, values, bias, index[0][:0], *index[1:])
    with pytest.raises(RegrowError, match="g is"):
        spmm_t(g[:, 1:], values, *index, 12)
    for width in (13, -4):
        with pytest.raises(RegrowError, match=f"in_features is {width}"):
            spmm_t(g, values, *index, width)
    with pytest.raises(RegrowError, match="col_idx holds 2"):
        spmm_t(g, values, *index, 8)
    with pytest.raises(RegrowError, match="col_idx holds 2"):
        spmm(x[:, 4:], values, bias, *index)
    with pytest.raises(RegrowError, match="rows"):
        sddmm(g[1:], x, *index, 4)
    with pytest.raises(RegrowError, match="block_size"):
        sddmm(g, x, *index, 0)
    with pytest.raises(RegrowError, match="block_cols is 2"):
        sddmm(g, x, *index, 4, 2)


def test_an_optimizer_state_of_another_shape_is_refused() -> None:
    """It may come from a file; torch loads it without a look."""
    good = {name: torch.ones(3, 4, 4) for name in ("values", "grad", "mean", "square")}
    good |= {"size": torch.ones(3), "root": torch.ones(3)}
    options = {"betas": (0.9, 0.999), "keep": 1.0, "eps": 1e-8}
    for name, bad in (
        ("grad", torch.ones(3, 4)),
        ("mean", torch.ones(2, 4, 4)),
        ("square", torch.ones(3, 4, 4).double()),
        ("size", torch.ones(2)),
        ("root", torch.ones(())),
    ):
        with pytest.raises(RegrowError, match=f"{name}.* is "):
            cpu.adamw_(**{**good, name: bad}, **options)
    assert torch.equal(good["values"], torch.ones(3, 4, 4))


def test_arguments_of_the_loss_and_of_its_embedding_are_checked() -> None:
    logits, targets = torch.zeros(2, 5), torch.tensor([1, 4])
    for bias in (torch.zeros(5).bfloat16(), torch.zeros(4)):
        with pytest.raises(RegrowError, match="bias is"):
            cpu.cross_entropy_(logits, bias, targets, 1.0)
    for bad in (targets.int(), targets[:1]):
        with pytest.raises(RegrowError, match="targets is"):
            cpu.cross_entropy_(logits, None, bad, 1.0)
        with pytest.raises(RegrowError, match="rows is"):
            cpu.add_rows_(logits, bad, torch.ones(2, 5))
    for bad in (torch.ones(2, 4), torch.ones(2, 5).double()):
        with pytest.raises(RegrowError, match="values is"):
            cpu.add_rows_(logits, targets, bad)


def test_a_logit_that_is_no_number_makes_the_loss_none(isa: str) -> None:
    logits, targets = normal(3, 40), torch.tensor([1, 2, 39])
    logits[1, 17] = torch.nan
    losses, sums = cpu.cross_entropy_(logits, None, targets, 1.0)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, False] and sums.isnan().all()


def test_no_rows_and_no_blocks_at_all() -> None:
    index = [torch.tensor(i, dtype=torch.int32) for i in ([0], [], [])]
    for n in (0, 5):
        dvalues, g_sum = torch.ops.regrow.sddmm(normal(n, 0), normal(n, 12), *index, 4, True)
        assert dvalues.shape == (0, 4, 4) and g_sum.shape == (0,)


def test_no_blocks_at_all() -> None:
    p = pattern(4, 3, 0)
    x, values, bias = normal(5, 12).requires_grad_(), torch.empty(0, 4, 4).requires_grad_(), normal(16)
    y = spmm(x, values, bias, *p.index)
    assert torch.equal(y, bias.expand(5, 16))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(5, 12))
    assert values.grad.shape == (0, 4, 4)


def test_isa_from_the_environment() -> None:
    # The extension alone, found by its path: importing torch three times takes longer than all tests here.
    path = cpu.native().__file__
    code = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_native", {path!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa())
"""
    for isa in cpu.native().available_isas():
        env = {**os.environ, "REGROW_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [isa]


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match="generic"):
        cpu.native().set_isa("avx1024")


@needs_fork
def test_one_thread_works_in_a_forked_child() -> None:
    x, values, bias, *index = arguments("spmm", 4, grad=False)

    def compute() -> float:
        return float(spmm(x, values, bias, *index).sum())

    expected = compute()  # the parent's thread pool now exists
    assert in_forked_child(compute) == expected


def test_several_python_threads_at_once() -> None:
    """The interpreter is released while a kernel runs; every calling thread has scratch of its own."""
    p = pattern(32, 24, 200)
    values = normal(200, 16, 16, seed=1)
    inputs = [normal(300, 24 * 16, seed=10 + i) for i in range(8)]
    expected = [spmm(x, values, None, *p.index) for x in inputs]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(lambda x: spmm(x, values, None, *p.index), inputs), expected, strict=True):
                assert torch.equal(ours, theirs)
