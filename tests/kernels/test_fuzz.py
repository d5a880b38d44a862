"""Fuzzing: the compiled kernels agree with the reference wherever they do not refuse their arguments.

Each argument of each operator is damaged in every way we know. Whoever then reads past an array gives other numbers,
for there is poison; under `make sanitize` any access past one is an error at once. `make fuzz` runs this for hours.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from regrow import BlockTopology, RegrowError, TopologyUpdate
from regrow.kernels import cpu
from regrow.nn import BlockSparseLinear, linear_cross_entropy, merged_linear
from regrow.nn.tied import SharedGradient, tied_embedding
from regrow.optim import AdamW

from ..tolerances import assert_same_numbers
from ..topology.test_blocks import assert_consistent
from .problems import pattern

fuzzed = settings(
    max_examples=int(os.environ.get("REGROW_FUZZ_EXAMPLES", "15")),
    derandomize="REGROW_FUZZ_EXAMPLES" not in os.environ,  # the suite tries the same ones every time
    deadline=None,
    suppress_health_check=list(HealthCheck),  # examples are large; what they cost is ours to say
)

# ---- arguments ------------------------------------------------------------------------------------

POISON = {torch.float32: torch.nan, torch.int32: 2**31 - 1, torch.int64: 2**62}


def placed(draw: st.DrawFn, t: Tensor) -> Tensor:
    """The same numbers: alone, where a sanitizer sees their ends, or unaligned in the midst of poison."""
    if draw(st.booleans()):
        return t
    room = torch.full((t.numel() + 8,), POISON[t.dtype], dtype=t.dtype)
    room[3 : 3 + t.numel()] = t.flatten()
    return room[3 : 3 + t.numel()].view(t.shape)


class Source:
    """Draws tensors. Numbers are few quarters, so that sums of products are exact in any order."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def below(self, n: int) -> int:
        return self.draw(st.integers(0, n - 1))

    def numbers(self, *shape: int) -> Tensor:
        return placed(self.draw, torch.randint(-4, 5, shape, generator=self.generator) / 4)

    def tokens(self) -> int:
        return self.one_of(0, 1, 2, 3, 5, 16, 17, 33, 64, 65, 70)

    def weight(self, rows: int, cols: int, b: int, width: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``values`` and ``row_ptr, col_idx, slot``; rows, columns and the whole may be empty."""
        n = self.one_of(0, 1, rows * cols // 8, rows * cols // 2, rows * cols)
        p = pattern(rows, cols, min(n, rows * cols), seed=self.below(1000))
        return self.numbers(p.n_blocks, b, width or b), tuple(placed(self.draw, i) for i in p.index)

    def blocks(self, b: int) -> int:
        """Along one edge of a weight."""
        return self.one_of(0, 1, 2, 3, 5, max(1, 40 // b))

    def bias(self, n: int) -> Tensor | None:
        return self.one_of(None, self.numbers(n))

    def flags(self, n: int) -> list[bool]:
        return [self.draw(st.booleans()) for _ in range(n)]

    def edge(self) -> int:
        return self.one_of(1, 2, 4, 8, 16, 32, 64, 3)  # the last has no compiled kernel

    def offsets(self) -> Tensor:
        lengths = self.draw(st.lists(self.one_of(st.integers(0, 9), st.integers(0, 70)), max_size=4))
        return placed(self.draw, torch.tensor([0, *lengths]).cumsum(0).int())


def spmm(s: Source, *, gelu: bool = False) -> tuple:
    b, n = s.edge(), s.tokens()
    width = s.one_of(b, b, 1)
    rows, cols = s.blocks(b), s.blocks(width)
    if s.below(8) == 0:  # gathered blocks
        b, width, cols = 16, 1, s.one_of(1, 7, 16, 40, 300)
    if b == 1 and s.below(4) == 0:  # rows so long that they are taken in chunks
        rows, cols, n = s.one_of(1, 3), 400, s.one_of(255, 256, 300)
    values, index = s.weight(rows, cols, b, width)
    return s.numbers(n, cols * width), values, s.bias(rows * b), *index, *(s.flags(1) if gelu else ())


def spmm_t(s: Source) -> tuple:
    x, values, _, *index = spmm(s)
    g = s.numbers(x.shape[0], (index[0].shape[0] - 1) * values.shape[1])
    return g, values, *index, x.shape[1]


def sddmm(s: Source) -> tuple:
    g, values, *index, width = spmm_t(s)
    return g, s.numbers(g.shape[0], width), *index, values.shape[1], *s.flags(1), values.shape[2]


def spmm_gelu_backward(s: Source) -> tuple:
    g, values, *index, width = spmm_t(s)
    return g, s.numbers(*g.shape), s.numbers(g.shape[0], width), values, *index, *s.flags(3)


def ffn(s: Source) -> tuple:
    b, n = s.edge(), s.tokens()
    widths = [s.blocks(b) for _ in range(3)]
    if s.below(8) == 0:  # so wide that the hidden width is taken slab by slab
        widths[1] = 3100 // b
    (values1, index1), (values2, index2) = (s.weight(widths[i + 1], widths[i], b) for i in range(2))
    first = s.numbers(n, widths[0] * b), values1, s.bias(widths[1] * b), *index1
    return *first, values2, s.bias(widths[2] * b), *index2


def ffn_backward(s: Source) -> tuple:
    forward = ffn(s)
    out = (forward[-3].shape[0] - 1) * forward[1].shape[1]
    return s.numbers(forward[0].shape[0], out), *forward[:7], *forward[8:], *s.flags(5)


def options(s: Source, heads: int) -> tuple:
    return heads, s.one_of(1.0, 0.125), s.one_of(0.0, 0.3), s.one_of(0, -1, 1234567890123456789)


def attention(s: Source) -> tuple:
    offsets, heads, width = s.offsets(), s.one_of(1, 2, 3), s.one_of(1, 7, 16, 32, 40)
    return s.numbers(int(offsets[-1]), 3 * heads * width), offsets, *options(s, heads)


def attention_backward(s: Source) -> tuple:
    qkv, offsets, *rest = attention(s)
    with by_reference():
        out, lse = torch.ops.regrow.attention(qkv, offsets, *rest)
    return s.numbers(*out.shape), qkv, out, lse, offsets, *rest


def sparse_attention(s: Source) -> tuple:
    b, offsets, heads, width = s.edge(), s.offsets(), s.one_of(1, 2, 3), s.one_of(16, 32, 64)
    width = max(width, b) if b != 3 else 6
    n_in, hidden, n_out = s.blocks(b), heads * width // b, s.blocks(b)
    (values1, index1), (values2, index2) = s.weight(3 * hidden, n_in, b), s.weight(n_out, hidden, b)
    values1 = values1 / 4  # scores of a few units
    first = s.numbers(int(offsets[-1]), n_in * b), offsets, values1, s.bias(3 * heads * width), *index1
    return *first, values2, s.bias(n_out * b), *index2, *options(s, heads)


def sparse_attention_backward(s: Source) -> tuple:
    forward = sparse_attention(s)
    with by_reference():
        y, lse, attended = torch.ops.regrow.sparse_attention(*forward)
    x, offsets, *weights = forward[:12]
    return s.numbers(*y.shape), x, lse, attended, offsets, *weights[:6], *weights[7:], *forward[12:], *s.flags(5)


def dropout_add_norm(s: Source) -> tuple:
    n, width = s.tokens(), s.one_of(2, 3, 16, 31, 127, 128, 129, 200)
    x, residual, weight, bias = (s.numbers(*shape) for shape in ((n, width), (n, width), (width,), (width,)))
    return x, s.one_of(None, residual), weight, bias, 1e-2, s.one_of(0.0, 0.3), s.below(99)


def dropout_add_norm_backward(s: Source) -> tuple:
    x, residual, weight, bias, eps, *rest = dropout_add_norm(s)
    with by_reference():
        _, mean, rstd = torch.ops.regrow.dropout_add_norm(x, residual, weight, bias, eps, *rest)
    return s.numbers(*x.shape), x, residual, mean, rstd, weight, *rest, *s.flags(2)


def dropout(s: Source) -> tuple:
    return s.numbers(s.tokens(), s.one_of(0, 1, 15, 127, 128, 129, 300)), s.one_of(0.0, 0.3), s.one_of(0, -1, 7)


EXACT = spmm, spmm_t, sddmm, dropout
ROUNDED = (
    spmm_gelu := lambda s: spmm(s, gelu=True),
    spmm_gelu_backward,
    ffn,
    ffn_backward,
    attention,
    attention_backward,
    sparse_attention,
    sparse_attention_backward,
    dropout_add_norm,
    dropout_add_norm_backward,
)
spmm_gelu.__name__ = "spmm_gelu"
every_operator = pytest.mark.parametrize("op", [*EXACT, *ROUNDED], ids=lambda op: op.__name__)

# ---- running --------------------------------------------------------------------------------------


@contextmanager
def by_reference() -> Iterator[None]:
    """No compiled kernels."""
    never = {"return_value": False}
    with (
        patch.object(cpu, "supports", **never),
        patch.object(cpu, "supports_rows", **never),
        patch("regrow.kernels.attention._native", **never),
    ):
        yield


@contextmanager
def machine(s: Source) -> Iterator[None]:
    """Some instruction set and number of threads."""
    native, threads = cpu.native(), torch.get_num_threads()
    isa = native.isa()
    native.set_isa(s.one_of(*native.available_isas()))
    torch.set_num_threads(s.one_of(1, 2, 3, 4))
    try:
        yield
    finally:
        native.set_isa(isa)
        torch.set_num_threads(threads)


def compare(op: Callable, arguments: tuple) -> None:
    """Both implementations; the reference has to accept what the compiled kernels accept."""
    run = getattr(torch.ops.regrow, op.__name__)
    ours = run(*arguments)
    with by_reference():
        theirs = run(*arguments)
    results = [[r] if isinstance(r, Tensor) else r for r in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and a.dtype is b.dtype and a.device == b.device
        if op in EXACT and not a.is_meta:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        elif not a.is_meta:
            assert_same_numbers(a, b)


@every_operator
@fuzzed
@given(data=st.data())
def test_any_layout_agrees_with_the_reference(op: Callable, data: st.DataObject) -> None:
    source = Source(data.draw)
    arguments = op(source)
    with machine(source):
        compare(op, arguments)


# ---- damage ---------------------------------------------------------------------------------------


@contextmanager
def may_refuse(*others: type[Exception]) -> Iterator[None]:
    """With a message."""
    try:
        yield
    except (RegrowError, *others) as error:
        if not str(error):
            raise


def damaged(s: Source, t: Tensor) -> Tensor:
    """Another shape, dtype, device, stride, or other contents."""
    shapes: dict[str, Callable[[], Tensor]] = {
        "shorter": lambda: t[1:],
        "narrower": lambda: t[..., 1:],
        "longer": lambda: torch.cat([t, t[:1]]),
        "wider": lambda: torch.cat([t, t[..., :1]], -1),
        "flat": lambda: t.flatten(),
        "deeper": lambda: t[None],
        "nothing": lambda: t[:0],
        "scalar": lambda: t.flatten()[:1].sum().to(t.dtype),
        "one number, repeated": lambda: t.flatten()[:1].sum().to(t.dtype).expand(t.shape),
        "strided": lambda: torch.stack([t, t], -1)[..., 0],
        "transposed": lambda: t.mT.contiguous().mT if t.dim() > 1 else t.flip(0),
        "meta": lambda: t.to("meta"),
        **{str(dtype): lambda dtype=dtype: t.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64)},
        "int32 or float32": lambda: t.to(torch.float32 if t.dtype is torch.int32 else torch.int32),
    }
    n, largest = t.numel(), 2**31 if t.dtype is torch.int32 else 2**63
    contents = (torch.nan,) if t.is_floating_point() else (-largest, -100, -1, 0, 1, n - 1, n, n + 1, largest - 1)
    choice = s.draw(st.sampled_from([*shapes, *["contents"] * 8]))
    if choice != "contents" or not t.numel():
        return shapes.get(choice, shapes["strided"])()
    broken = t.flatten().clone()
    if not t.is_floating_point() and s.below(3) == 0:
        i, j = s.below(t.numel()), s.below(t.numel())
        broken[[i, j]] = broken[[j, i]]  # perhaps out of order, perhaps another layout
    else:
        broken[s.below(t.numel())] = s.one_of(*contents)
    return placed(s.draw, broken.view(t.shape))


@every_operator
@fuzzed
@given(data=st.data())
def test_damaged_tensors_are_refused_or_mean_the_same_to_the_reference(op: Callable, data: st.DataObject) -> None:
    source = Source(data.draw)
    arguments = list(op(source))
    position = source.one_of(*(i for i, a in enumerate(arguments) if isinstance(a, Tensor)))
    arguments[position] = damaged(source, arguments[position])
    by_torch = [RuntimeError] if arguments[position].is_meta else []
    with machine(source), may_refuse(*by_torch):
        compare(op, tuple(arguments))


# 2^40 is more than any machine has; 2^31 would be allocated, and more than most have.
NUMBERS = {int: (-(2**63), -1, 0, 1, 2, 3, 5, 2**40), float: (-1.0, 0.0, 1.0, 1e30, torch.inf, torch.nan)}


@every_operator
@fuzzed
@given(data=st.data())
def test_any_size_or_option_is_refused_or_means_the_same_to_the_reference(op: Callable, data: st.DataObject) -> None:
    source = Source(data.draw)
    arguments = list(op(source))
    positions = [i for i, a in enumerate(arguments) if type(a) in NUMBERS]
    if not positions:
        return
    position = source.one_of(*positions)
    number = arguments[position] = source.one_of(*NUMBERS[type(arguments[position])])
    with machine(source), may_refuse(RuntimeError):  # torch's: a result of 2^40 columns, say
        if isinstance(number, float) and not abs(number) <= 1:
            getattr(torch.ops.regrow, op.__name__)(*arguments)  # what overflows means nothing, but must do no harm
        else:
            compare(op, tuple(arguments))


# ---- what has no operator: through the functions that users call ----------------------------------


def loss(s: Source) -> tuple:
    n, width, classes = s.tokens(), s.one_of(1, 4), s.one_of(1, 2, 15, 16, 17, 100)
    targets = torch.randint(classes, (n,), generator=s.generator)
    return s.numbers(n, width), s.numbers(classes, width), s.bias(classes), placed(s.draw, targets)


def run_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> list[Tensor]:
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    value = linear_cross_entropy(*leaves, targets, rows=40)
    return [value.detach(), *torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])]


def embedding(s: Source) -> tuple:
    words, width, n = s.one_of(1, 5, 30), s.one_of(1, 3, 16, 40), s.tokens()
    ids = torch.randint(words, (n,), generator=s.generator)
    return placed(s.draw, ids), s.numbers(words, width), s.numbers(words, width), s.numbers(n, width)


def run_embedding(ids: Tensor, weight: Tensor, of_loss: Tensor, g: Tensor) -> list[Tensor]:
    leaf, shared = weight.clone().requires_grad_(), SharedGradient()
    rows = tied_embedding(ids, leaf, shared)
    shared.gradient = of_loss.clone()
    return list(torch.autograd.grad(rows, leaf, g))


def step(s: Source) -> tuple:
    """Values, their gradient, and what an optimizer's file holds."""
    n, *block = s.one_of((1, 1, 1), (5, 1, 1), (3, 4, 4), (2, 16, 16), (7, 3))
    values, gradient, mean = (s.numbers(n, *block) for _ in range(3))
    return values, gradient, mean, s.numbers(n, *block).square(), s.numbers(n).abs() + 1


def run_step(values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, steps: Tensor) -> list[Tensor]:
    parameter = torch.nn.Parameter(values.clone())
    optimizer = AdamW([parameter], lr=0.1, eps=0.1)
    moments = {"exp_avg": mean.clone(), "exp_avg_sq": square.clone(), "block_step": steps.clone()}
    state = {
        "state": {0: {"step": torch.tensor(3.0), **moments}},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    optimizer.load_state_dict(state)
    parameter.grad = gradient
    optimizer.step()
    return [parameter.detach(), *optimizer.state[parameter].values()]


FUNCTIONS = {loss: run_loss, embedding: run_embedding, step: run_step}
every_function = pytest.mark.parametrize("of", FUNCTIONS, ids=lambda of: of.__name__)


def compare_functions(of: Callable, arguments: tuple) -> None:
    ours = FUNCTIONS[of](*arguments)
    never = {"return_value": False}
    with patch.object(cpu, "supports_dense", **never), patch.object(cpu, "supports_adamw", **never):
        theirs = FUNCTIONS[of](*arguments)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype is b.dtype
        assert_same_numbers(a, b)


@every_function
@fuzzed
@given(data=st.data())
def test_functions_agree_with_torch(of: Callable, data: st.DataObject) -> None:
    source = Source(data.draw)
    arguments = of(source)
    with machine(source):
        compare_functions(of, arguments)


@every_function
@fuzzed
@given(data=st.data())
def test_functions_refuse_what_is_damaged_or_do_as_torch_does(of: Callable, data: st.DataObject) -> None:
    source = Source(data.draw)
    arguments = list(of(source))
    position = source.one_of(*(i for i, a in enumerate(arguments) if a is not None))
    arguments[position] = damaged(source, arguments[position])
    with machine(source), may_refuse(RuntimeError, TypeError, IndexError):  # torch refuses much of it first
        compare_functions(of, tuple(arguments))


# ---- layers: whatever became of their indices, no call leaves the arrays -----------------------------


def a_layer(s: Source) -> BlockSparseLinear:
    b, sizes = s.one_of(1, 4, 16), (1, 2, 3, 5)
    return BlockSparseLinear(
        s.one_of(*sizes) * b,
        s.one_of(*sizes) * b,
        block_size=b,
        density=s.one_of(0.2, 0.5, 1.0),
        generator=s.generator,
    )


def use(layer: BlockSparseLinear) -> None:
    """Forward and backward, alone and merged: refused, or what the reference computes."""
    x = torch.randn(3, layer.in_features).requires_grad_()
    for call in (layer, lambda x: merged_linear([layer, layer], x)[:, : layer.out_features]):
        with may_refuse(RuntimeError, IndexError):  # torch's, where layers are put side by side
            y = call(x)
            y.sum().backward()
            with by_reference():
                assert_same_numbers(y.detach(), layer(x).detach())


@fuzzed
@given(data=st.data())
def test_damaged_states_are_refused_by_layers_or_by_their_kernels(data: st.DataObject) -> None:
    source = Source(data.draw)
    layer = a_layer(source)
    state = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    name = source.one_of(*(name for name in state if "topology" in name))
    if source.below(4) == 0:
        del state[name]
    else:
        state[name] = damaged(source, state[name])
    strict, assign = source.flags(2)
    with may_refuse(RuntimeError):  # torch's: missing keys, other shapes
        layer.load_state_dict(state, strict=strict, assign=assign)
        assert_consistent(layer.topology)
    if not layer.topology.get_buffer(name.rpartition(".")[2]).is_meta:
        use(layer)


@fuzzed
@given(data=st.data())
def test_damaged_buffers_are_refused_by_kernels(data: st.DataObject) -> None:
    """Of a layer, a copy of it, or what was cast to another dtype and back."""
    source = Source(data.draw)
    layer = a_layer(source)
    how = source.one_of("buffer", "in place", "copy", "double", "type")
    if how == "copy":
        layer = copy.deepcopy(layer)
    if how == "double":
        layer = layer.double().float()
    if how == "type":
        layer = layer.type(torch.float32)  # buffers too
    name = source.one_of("row_ptr", "col_idx", "slot")
    buffer = layer.topology.get_buffer(name)
    if how == "in place":
        buffer[source.below(buffer.numel())] = source.one_of(-(2**31), -1, 0, buffer.numel(), 2**31 - 1)
    elif how != "type":
        setattr(layer.topology, name, damaged(source, buffer))
    if not any(b.is_meta for b in layer.topology.buffers()):
        use(layer)


@fuzzed
@given(data=st.data())
def test_updates_are_refused_whole_or_leave_a_layout(data: st.DataObject) -> None:
    source = Source(data.draw)
    rows, cols = source.one_of(1, 2, 5), source.one_of(1, 3, 7)
    topology = BlockTopology.random(rows, cols, 1 + source.below(rows * cols), source.generator)
    before = topology.keys()
    numbers = st.one_of(st.integers(-1, 8), st.sampled_from([-(2**63), 2**31, 2**32, 2**62]))
    lists = [data.draw(st.lists(numbers, max_size=4)) for _ in range(2)]
    others = data.draw(st.lists(numbers, min_size=len(lists[1]), max_size=len(lists[1])))
    try:
        topology.reallocate(TopologyUpdate(*(torch.tensor(i, dtype=torch.int64) for i in (*lists, others))))
    except RegrowError:
        assert torch.equal(topology.keys(), before)
    assert_consistent(topology)
