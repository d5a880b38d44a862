"""The GPU kernels: prepares the tensors and launches :mod:`regrow.kernels.triton_kernels`.

float32, bfloat16 and float16 on a CUDA device; sums are in float32. For float32 the matrix units round as PyTorch's
own do: ``torch.backends.cuda.matmul.allow_tf32`` or ``torch.set_float32_matmul_precision("high")`` switch TF32 on.

Triton comes with PyTorch's CUDA builds and is loaded at the first call. Without a GPU the same kernels run, slowly, in
Triton's interpreter: inside :func:`interpreted`, with the environment variable ``TRITON_INTERPRET=1``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels.checks import check_adamw

BLOCKS = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (16, 1))
"""Outputs and inputs of the blocks there are kernels for."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_interpreting = False


@dataclass(frozen=True)
class Plan:
    """How a product is cut into programs. It follows from the sizes alone, so that sums have the same order always."""

    tokens: int = 64
    """Rows of the activations in a program."""
    terms: int = 64
    """Terms of one matrix product: so many input features of several blocks are taken together."""
    targets: int = 8
    """Output blocks a program makes one after the other, of the same tokens, which then stay in its caches."""
    feature_major: bool = True
    """Have activations with the tokens of a feature side by side, copied if need be: then a block's input, however
    narrow, is whole cache lines. What one product hands to the next is made so at once."""
    warps: int = 4
    stages: int = 3


@cache
def kernels() -> ModuleType:
    """The Triton programs.

    Raises:
        ImportError: Triton is not installed; the message says how to get it.
    """
    try:
        return import_module("regrow.kernels.triton_kernels")
    except ImportError as error:
        raise ImportError(
            f"regrow's GPU kernels need Triton ({error}); it comes with PyTorch's CUDA builds, or: pip install triton"
        ) from error


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, tensors on the CPU go through these kernels too, in Triton's interpreter: to test or to debug them.

    Raises:
        RegrowError: Triton was not told to interpret before the kernels were loaded.
    """
    global _interpreting
    if type(kernels().product).__name__ != "InterpretedFunction":
        raise RegrowError("Triton's interpreter is off; set the environment variable TRITON_INTERPRET=1 at the start")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def handles(device: torch.device) -> bool:
    """Whether tensors on this device go through these kernels."""
    return device.type == "cuda" or (_interpreting and device.type == "cpu")


def supports(x: Tensor, block_size: int, block_cols: int | None = None) -> bool:
    """Whether these kernels handle it; anything else goes to the reference."""
    known = (block_size, block_size if block_cols is None else block_cols) in BLOCKS
    return handles(x.device) and x.dtype in DTYPES and known


def plan(height: int, width: int) -> Plan:
    """How to cut a product with blocks of ``height`` outputs and ``width`` inputs."""
    edge = max(height, width)
    if edge < 32:
        return Plan()
    # with 4 warps the GELU of a block of 64 finds no room in the registers
    return Plan(tokens=128, targets=1, feature_major=False, warps=4 if edge == 32 else 8)


# The shapes, dtypes and devices were checked by the operators. What the index arrays hold is not: to look would mean
# to wait for the device. The kernels stay inside the arrays whatever it is.


def spmm(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor]) -> Tensor:
    """``x W^T + bias``."""
    return spmm_gelu(x, values, bias, index, with_slope=False, gelu=False)[0]


def spmm_gelu(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], with_slope: bool, gelu: bool = True
) -> tuple[Tensor, Tensor]:
    """``gelu(x W^T + bias)``; and the derivative of the activation there, or nothing of it."""
    _, height, width = values.shape
    strides = {"TARGET": height, "SOURCE": width, "TARGET_STRIDE": width, "SOURCE_STRIDE": 1}
    cut = plan(height, width)
    y = empty(x, (index[0].shape[0] - 1) * height, gelu and cut.feature_major, _accumulated(x))
    slope = torch.empty_like(y) if with_slope else y.new_empty(0)
    _product(x, values, bias, y, slope, index, cut, {**strides, "GELU": gelu, "WITH_SLOPE": with_slope})
    return y.to(x.dtype), slope.to(x.dtype)


def spmm_t(g: Tensor, values: Tensor, index: Sequence[Tensor], in_features: int, feature_major: bool = False) -> Tensor:
    """``g W``."""
    _, height, width = values.shape
    strides = {"TARGET": width, "SOURCE": height, "TARGET_STRIDE": 1, "SOURCE_STRIDE": width}
    y = empty(g, in_features, feature_major, _accumulated(g))
    by_columns = transposed(index, in_features // width)
    _product(g, values, None, y, y, by_columns, plan(width, height), {**strides, "GELU": False, "WITH_SLOPE": False})
    return y.to(g.dtype)


def _product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    slope: Tensor,
    index: Sequence[Tensor],
    cut: Plan,
    constants: dict[str, Any],
) -> None:
    if not y.numel():
        return
    x = laid_out(x, cut)
    target, source = constants["TARGET"], constants["SOURCE"]
    n_tokens, n_targets = y.shape[0], y.shape[1] // target
    sizes = n_tokens, n_targets, x.shape[1] // source, values.shape[0], *x.stride(), *y.stride()
    grid = (-(-n_tokens // cut.tokens) * -(-n_targets // cut.targets),)
    with _on(x):
        kernels().product[grid](
            *(x, values.contiguous(), y if bias is None else bias.contiguous(), y, slope, *index, *sizes),
            **constants,
            TOKENS=cut.tokens,
            COUNT=max(1, cut.terms // source),
            TARGETS=cut.targets,
            WITH_BIAS=bias is not None,
            **_arithmetic(x),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )


def sddmm(
    g: Tensor, x: Tensor, index: Sequence[Tensor], block_size: int, block_cols: int, with_sum: bool
) -> tuple[Tensor, Tensor]:
    """``g^T x`` at the blocks, in slot order; and ``g.sum(0)``, or nothing of it."""
    n_tokens, n_rows, n_blocks = g.shape[0], index[0].shape[0] - 1, index[2].shape[0]
    g_sum = g.sum(0) if with_sum else g.new_empty(0)
    cut = plan(block_size, block_cols)
    parts, tokens_each = _parts(n_tokens, n_rows, cut.tokens)
    # zeros: a damaged index may name a slot twice, and another not at all
    sums = g.new_zeros((parts, n_blocks, block_size, block_cols), dtype=torch.float32)
    if sums.numel() and n_tokens:
        g, x = laid_out(g, cut), laid_out(x, cut)
        sizes = n_tokens, x.shape[1] // block_cols, n_blocks, tokens_each, *g.stride(), *x.stride()
        with _on(g):
            kernels().block_products[(n_rows, parts)](
                *(g, x, sums, *index, *sizes),
                HEIGHT=block_size,
                WIDTH=block_cols,
                TOKENS=cut.tokens,
                COUNT=max(1, cut.terms // block_cols),
                **_arithmetic(g),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
    return sums.sum(0).to(g.dtype), g_sum


def transposed(index: Sequence[Tensor], n_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """``col_ptr, row_idx, slot``: the same entries ordered by columns, and by rows within a column."""
    row_ptr, col_idx, slot = index
    n = col_idx.shape[0]
    col_ptr, row_idx, slot_t = col_idx.new_zeros(n_cols + 1), torch.empty_like(col_idx), torch.empty_like(slot)
    if n and n_cols:
        entries = torch.arange(n, dtype=torch.int32, device=col_idx.device)
        owner = torch.searchsorted(row_ptr[1:], entries, right=True, out_int32=True)
        with _on(col_idx):
            kernels().by_columns[(n_cols,)](col_idx, owner, slot, col_ptr, row_idx, slot_t, n_cols, n, CHUNK=_CHUNK)
    return col_ptr, row_idx, slot_t


def empty(x: Tensor, features: int, feature_major: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a result ``[N, features]`` from ``x [N, ...]``."""
    dtype = dtype or x.dtype
    if feature_major:
        return x.new_empty(features, x.shape[0], dtype=dtype).t()
    return x.new_empty(x.shape[0], features, dtype=dtype)


def is_feature_major(x: Tensor) -> bool:
    """Whether the tokens of a feature lie side by side in ``x [N, features]``, and not the features of a token."""
    return x.stride(0) == 1 and x.stride(1) != 1


def supports_adamw(*written: Tensor) -> bool:
    """Whether :func:`adamw_` can write these tensors."""
    return all(handles(x.device) and x.dtype is torch.float32 and x.is_contiguous() and x.numel() for x in written)


def adamw_(
    values: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    size: Tensor,
    root: Tensor,
    *,
    betas: tuple[float, float],
    keep: float,
    eps: float,
) -> None:
    """One AdamW step in place, in one program: arguments and errors are those of :func:`regrow.kernels.cpu.adamw_`."""
    check_adamw(values, grad, mean, square, size, root)
    n, (beta1, beta2) = values.numel(), betas
    numbers = n, n // values.shape[0], 1 - beta1, beta2, 1 - beta2, keep, eps
    arrays = values, grad.contiguous(), mean, square, size.contiguous(), root.contiguous()
    with _on(values):
        kernels().adamw[(-(-n // _CHUNK),)](*arrays, *numbers, CHUNK=_CHUNK)


_CHUNK = 1024


def laid_out(x: Tensor, cut: Plan) -> Tensor:
    """``x`` with the strides that the plan wants: at least one of them is 1, or a program reads scattered numbers."""
    if cut.feature_major:
        return x if x.stride(0) == 1 else x.t().contiguous().t()
    return x if 1 in x.stride() else x.contiguous()


def _parts(n_tokens: int, n_rows: int, tokens: int) -> tuple[int, int]:
    """Into how many parts tokens are shared, and how many each has: enough programs for a large device.

    From the sizes alone, not from the device, so that sums are in the same order everywhere.
    """
    tiles = -(-n_tokens // tokens)
    parts = max(1, min(tiles, -(-_PROGRAMS // max(1, n_rows))))
    each = -(-tiles // parts) * tokens
    return max(1, -(-n_tokens // max(1, each))), each


_PROGRAMS = 528
"""So many keep a large GPU busy: four for each of an H200's 132 multiprocessors. More parts are more memory."""


def _arithmetic(x: Tensor) -> dict[str, Any]:
    tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": _widened(x)}


def _accumulated(x: Tensor) -> torch.dtype:
    """Of what a kernel writes: float32 in the interpreter, which would cut off to bfloat16 instead of rounding."""
    return torch.float32 if _widened(x) else x.dtype


def _widened(x: Tensor) -> bool:
    return not x.is_cuda and x.dtype is torch.bfloat16


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
