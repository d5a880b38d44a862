"""The GPU kernels against dense and float64: on the GPU, or without one in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow.errors import RegrowError
from regrow.kernels import cpu, gpu, reference, sddmm, spmm, spmm_gelu, spmm_t

from ..tolerances import assert_as_good_as_dense
from .problems import Pattern, check_product, from_dense, normal, pattern, to_dense

TOKENS = [1, 63, 200]


def small(block: tuple[int, int]) -> Pattern:
    rows, cols = (5, 3) if block[0] >= 16 else (11, 13)
    return pattern(rows, cols, rows * cols // 3, seed=block[0])


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("block", gpu.BLOCKS)
def test_values_and_gradients(block: tuple[int, int], n: int, dtype: torch.dtype, device: torch.device) -> None:
    check_product(small(block), block, n, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (8, 8), (16, 16), (16, 1)])
def test_gelu(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Its slope is kept in the dtype of the data, as accurate as the hidden activations that dense keeps."""
    check_product(small(block), block, 63, with_gelu=True, dtype=dtype, device=device)


@pytest.mark.parametrize("block", [(4, 4), (32, 32)])
def test_strided_input_without_bias(block: tuple[int, int], device: torch.device) -> None:
    check_product(small(block), block, 70, with_bias=False, strided=True, device=device)


@pytest.mark.parametrize(("n_rows", "n_cols", "n_blocks"), [(1, 9, 4), (9, 1, 4), (6, 5, 1), (7, 5, 35), (1, 1, 1)])
@pytest.mark.parametrize("block", [(4, 4), (16, 16), (64, 64)])
def test_awkward_patterns(
    block: tuple[int, int], n_rows: int, n_cols: int, n_blocks: int, device: torch.device
) -> None:
    check_product(pattern(n_rows, n_cols, n_blocks), block, 33, device=device)


def test_crowded_rows_and_several_parts_of_tokens(device: torch.device) -> None:
    check_product(pattern(20, 64, 100, crowded_rows=2), (16, 16), 400, device=device)


@pytest.mark.parametrize("block", gpu.BLOCKS)
def test_operations_alone(block: tuple[int, int], device: torch.device) -> None:
    b, width = block
    p = small(block).to(device)
    g, x, values = (
        normal(*shape, seed=i).to(device)
        for i, shape in enumerate([(40, p.n_rows * b), (40, p.n_cols * width), (p.n_blocks, b, width)])
    )
    for ours, dense in (
        (spmm_t(g, values, *p.index, x.shape[1]), lambda t: t(g) @ to_dense(t(values), p)),
        (sddmm(g, x, *p.index, b, width), lambda t: from_dense(t(g).T @ t(x), p, b, width)),
    ):
        assert_as_good_as_dense(ours, dense(torch.clone), dense(torch.Tensor.double))


def test_the_kernels_run_and_not_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above test what they say."""
    for name in ("spmm", "spmm_t", "sddmm"):
        for other in (cpu, reference):
            monkeypatch.setattr(other, name, None)
    check_product(small((16, 16)), (16, 16), 5, device=device)


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (16, 1)])
def test_same_bits_twice(block: tuple[int, int], device: torch.device) -> None:
    p = small(block).to(device)
    x, g = normal(300, p.n_cols * block[1]).to(device), normal(300, p.n_rows * block[0], seed=1).to(device)
    values = normal(p.n_blocks, *block, seed=2).to(device)
    for run in (
        lambda: spmm(x, values, None, *p.index),
        lambda: spmm_t(g, values, *p.index, x.shape[1]),
        lambda: sddmm(g, x, *p.index, *block),
    ):
        assert torch.equal(run(), run())


@pytest.mark.parametrize("shape", [(48, 16, 200), (9, 16, 20), (1, 7, 5), (7, 1, 5), (3, 3, 0), (60, 50, 2500)])
def test_transposed_indices(shape: tuple[int, int, int], device: torch.device) -> None:
    p = pattern(*shape).to(device)
    for ours, expected in zip(gpu.transposed(p.index, p.n_cols), p.by_columns, strict=True):
        assert torch.equal(ours, expected)


def test_no_tokens_and_no_blocks(device: torch.device) -> None:
    p = pattern(4, 3, 5).to(device)
    x, values = torch.empty(0, 48, device=device), normal(5, 16, 16).to(device)
    assert spmm(x, values, None, *p.index).shape == (0, 64)
    assert torch.equal(sddmm(x.new_empty(0, 64), x, *p.index, 16), torch.zeros_like(values))
    p, x, bias = pattern(4, 3, 0).to(device), normal(5, 48).to(device), normal(64).to(device)
    assert torch.equal(spmm(x, values[:0], bias, *p.index), bias.expand(5, 64))
    assert torch.equal(spmm_t(x.new_ones(5, 64), values[:0], *p.index, 48), torch.zeros_like(x))


@pytest.mark.parametrize("bad", [-(2**31), -1, 3, 5, 99, 2**31 - 1])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_bad_indices_reach_nothing_outside(position: int, bad: int, device: torch.device) -> None:
    """They are not looked at beforehand, which would wait for the device; the arrays have guards around them here."""
    p = pattern(4, 3, 5)
    index = [t.clone() for t in p.index]
    for place in range(index[position].numel()):
        index[position][place] = bad
        arrays = [guarded(t.to(device), 7) for t in index]
        g, x = guarded(normal(6, 64).to(device), torch.nan), guarded(normal(6, 48).to(device), torch.nan)
        values = guarded(normal(5, 16, 16).to(device), torch.nan)
        for y in (
            spmm(x, values, None, *arrays),
            spmm_t(g, values, *arrays, 48),
            sddmm(g, x, *arrays, 16),
        ):
            assert y.isfinite().all()


def guarded(t: torch.Tensor, guard: float) -> torch.Tensor:
    """The same numbers between others that must not be read."""
    room = torch.full((t.numel() + 8192,), guard, dtype=t.dtype, device=t.device)
    inner = room[4096 : 4096 + t.numel()].view(t.shape)
    return inner.copy_(t)


def test_what_there_is_no_kernel_for_goes_elsewhere(device: torch.device) -> None:
    x = torch.zeros(1, device=device)
    assert gpu.supports(x, 16) and gpu.supports(x.half(), 16, 1)
    assert not gpu.supports(x, 3) and not gpu.supports(x.double(), 16) and not gpu.supports(x, 8, 1)
    check_product(pattern(4, 3, 5), (3, 3), 5, device=device)


def test_gelu_of_what_is_huge_or_no_number(device: torch.device) -> None:
    h = torch.tensor([0.0, 1e30, -1e30, torch.inf, torch.nan], device=device)
    index = [torch.tensor(i, dtype=torch.int32, device=device) for i in ([0, 1], [0], [0])]
    y, slope = torch.ops.regrow.spmm_gelu(h[:, None], torch.ones(1, 1, 1, device=device), None, *index, True)
    expected = torch.tensor([0.0, 1e30, 0.0, torch.inf, torch.nan], device=device)
    torch.testing.assert_close(y.squeeze(1), expected, equal_nan=True)
    torch.testing.assert_close(slope[:4].squeeze(1), torch.tensor([0.5, 1.0, 0.0, 1.0], device=device))
    assert slope[4].isnan()


def test_gelu_is_the_activation_and_not_only_near_it(device: torch.device) -> None:
    x, values, bias = (normal(*s, seed=i).to(device) for i, s in enumerate([(9, 48), (5, 16, 16), (64,)]))
    p = pattern(4, 3, 5).to(device)
    expected = torch.nn.functional.gelu(spmm(x, values, bias, *p.index))
    torch.testing.assert_close(spmm_gelu(x, values, bias, *p.index), expected)


def test_the_interpreter_has_to_be_asked_for_at_the_start() -> None:
    code = "from regrow.kernels import gpu\nwith gpu.interpreted(): pass"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode and "TRITON_INTERPRET=1" in done.stderr
    assert RegrowError.__name__ in done.stderr


def test_all_kernels_compile_for_nvidia_devices() -> None:
    """With matrix units, loads of 16 bytes and nothing in local memory; no device is needed to compile."""
    pytest.importorskip("triton", reason="Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, check=True)
    reports = json.loads(done.stdout)
    assert len(reports) == 22
    for name, report in reports.items():
        assert report["local_memory"] == 0, name
        if "product" in name:
            assert report["matrix"] and report["wide_loads"], name


@pytest.mark.parametrize("block", [(4, 4), (32, 32), (16, 1)])
def test_opcheck(block: tuple[int, int], device: torch.device) -> None:
    """Also that results have the strides that compiled models are told."""
    p = pattern(4, 3, 5).to(device)
    x, g = normal(6, 3 * block[1]).to(device), normal(6, 4 * block[0], seed=1).to(device)
    values, bias = normal(5, *block, seed=2).to(device), normal(4 * block[0], seed=3).to(device)
    slope = torch.rand_like(g.t()).t()
    x, g, values, bias = (t.requires_grad_() for t in (x, g, values, bias))
    ops = torch.ops.regrow
    for op, args in (
        (ops.spmm, (x, values, bias, *p.index)),
        (ops.spmm_t, (g, values, *p.index, x.shape[1])),
        (ops.spmm_t, (g, values, *p.index, x.shape[1], True)),
        (ops.sddmm, (g, x, *p.index, block[0], True, block[1])),
        (ops.spmm_gelu, (x, values, bias, *p.index, True)),
        (ops.spmm_gelu_backward, (g.detach(), slope, x.detach(), values.detach(), *p.index, True, True, True)),
    ):
        torch.library.opcheck(op.default, args)


def test_what_goes_from_product_to_product_is_not_copied(device: torch.device) -> None:
    """Hidden activations and their gradient come with the tokens of a feature side by side, as products want them."""
    p, q = pattern(4, 3, 5).to(device), pattern(3, 4, 5, seed=1).to(device)
    x, values = normal(9, 48).to(device).requires_grad_(), normal(5, 16, 16).to(device)
    hidden = spmm_gelu(x, values, None, *p.index)
    seen = []
    hidden.register_hook(lambda grad: seen.append(grad.stride()))
    y = spmm(hidden, values, None, *q.index)
    y.sum().backward()
    assert [hidden.stride(), *seen] == [(1, 9), (1, 9)]
    assert y.stride() == x.grad.stride() == (48, 1)
