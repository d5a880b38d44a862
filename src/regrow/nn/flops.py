"""How many floating-point operations a training step takes. They follow from the layers; nothing is run.

Counted are the multiplications and additions of matrix products, as is usual. What a layer is for, and how many rows
go through it, is told by who knows a family of models: :mod:`regrow.nn.flops_family`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from torch import nn

from regrow.errors import RegrowError
from regrow.nn.flops_family import (
    ATTENTION,
    EMBEDDINGS,
    ENCODER,
    Costs,
    Family,
    Role,
    Rows,
    attention_width,
    has_no_product,
    recomputed_by,
    refuse_unknown,
    register_family,
    role_of,
)
from regrow.nn.flops_report import Convention, Flops, FlopsReport, LayerFlops, NotCounted, UpdateFlops
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.options import Composite, DenseFactor
from regrow.nn.shape import BlockShape
from regrow.nn.spark import SparkFFN

ADAMW_FLOPS = 14
"""Of one step of one weight: decay 1, first moment 3, second moment 4, denominator 3, step 3; a root counts as one."""

_PREDICTED = 0.15  # share of a sequence's positions, as BERT's
_WITHOUT_PRODUCTS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.PReLU)


@dataclass(frozen=True)
class LayerSize:
    """A layer in numbers, to count what an update costs."""

    in_features: int
    out_features: int
    block_size: int
    n_blocks: int
    block_cols: int | None = None
    """Inputs of a block that is not square."""

    @property
    def block_shape(self) -> BlockShape:
        return BlockShape(self.block_size, self.block_size if self.block_cols is None else self.block_cols)

    def dense_gradient_flops(self, tokens: int) -> int:
        """Of the gradient of the full weight."""
        return 2 * tokens * self.in_features * self.out_features


class UpdateRule(Protocol):
    """What is asked of a method: :class:`regrow.methods.Method` is one."""

    @property
    def name(self) -> str: ...
    @property
    def needs_gradient(self) -> bool: ...
    def update_flops(self, layer: LayerSize, tokens: int) -> int: ...


class Schedule(Protocol):
    """What is asked of a schedule: :class:`regrow.UpdateSchedule` is one."""

    @property
    def total_steps(self) -> int: ...
    def is_update(self, step: int) -> bool: ...


def count_flops(
    model: nn.Module,
    *,
    batch_size: int,
    seq_length: int,
    predicted: int | Literal["all"] | None = None,
    rows: Mapping[str, int] | None = None,
    method: UpdateRule | None = None,
    schedule: Schedule | None = None,
    optimizer: bool = False,
    convention: Convention = "exact",
) -> FlopsReport:
    r"""FLOPs of one training step, layer by layer, for the forward pass and both gradients.

    A layer whose weight has ``w`` elements (those of its blocks, if it is sparse), with ``n`` rows of input:

    .. math:: forward = input\ gradient = weight\ gradient = 2\,n\,w

    and attention over sequences of length ``L`` with queries of width ``a``, all heads together, which has two products
    forward and four backward:

    .. math:: forward = 4\,B L^2 a, \qquad input\ gradient = 8\,B L^2 a

    Not products, so 0: look-ups, biases, norms, activations, softmax, dropout, losses, gradient clipping, and the
    comparisons of a topology update. A frozen weight has no weight gradient, unless a mask of it is learned; a layer
    has no input gradient if nothing registered before it is trained. Every sequence is full, every layer runs once a
    step.

    ``convention="paper"`` counts what Dietrich et al. do, the encoder's layers and attention alone, without embeddings
    and heads: a sequence takes

    .. math:: 3\,(2\,L \cdot weights \cdot density + 4 \cdot layers \cdot L^2 \cdot hidden)

    Args:
        model: any module with ``nn.Linear`` and :class:`BlockSparseLinear` layers, on any device, also meta; of
            transformers' BERT models every layer and attention is known. Of others the attention is not seen.
        batch_size, seq_length: sequences of a step, choices of a multiple-choice model counted apart; their tokens.
        predicted: positions of a sequence that BERT's vocabulary head computes; by default ``round(0.15 * L)``, at
            least one. transformers' own models compute ``"all"``.
        rows: by glob of layer names, how many rows a sequence has there, if not one a token (or what is known).
        method, schedule: add the updates of a method, as ``regrow.methods.create("rigl")``, at a schedule's steps.
        optimizer: add AdamW, :data:`ADAMW_FLOPS` for each trained element.
        convention: ``"exact"`` or ``"paper"``.

    Returns:
        The report: parts, layers, totals of a step and a sequence; ``recomputed`` apart, which fused operations and
        gradient checkpointing compute twice, and ``not_counted``, modules with parameters that are not understood.

    Raises:
        RegrowError: an argument is out of range, a glob matches no layer, the model has cross-attention, ``method``
            comes without ``schedule``, or the paper's convention is asked of a model whose encoder is not known, or
            together with ``method`` or ``optimizer``.

    Example:
        >>> first, second = nn.Linear(64, 256), BlockSparseLinear(256, 64, block_size=16, density=0.25)
        >>> report = count_flops(nn.Sequential(first, nn.GELU(), second), batch_size=2, seq_length=10)
        >>> report.products  # 2 * 20 * (16384 + 4096) forward; the first layer has no input gradient
        Flops(forward=819200, input_gradient=163840, weight_gradient=819200)
        >>> report.per_sequence
        901120.0

    Source: Dietrich et al. 2021, arXiv 2108.06277, appendix A.2; Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
    """
    _check(batch_size, seq_length, predicted, method, schedule)
    if convention not in ("exact", "paper"):
        raise RegrowError(f"convention must be 'exact' or 'paper', got {convention!r}")
    if convention == "paper" and (method is not None or optimizer):
        raise RegrowError("convention='paper' counts neither updates nor the optimizer; leave out method and optimizer")
    refuse_unknown(model.named_modules())
    if predicted is None:
        predicted = max(1, round(_PREDICTED * seq_length))
    elif predicted == "all":
        predicted = seq_length
    per_sequence: dict[Rows, int] = {"tokens": seq_length, "sequences": 1, "predicted": predicted}
    costs = dict(_costs(model, batch_size, per_sequence, rows or {}, every_gradient=convention == "paper"))
    layers = list(costs.values())
    if convention == "paper":
        layers = [layer for layer in layers if layer.part in (ENCODER, ATTENTION)]
        if not layers:
            raise RegrowError("convention='paper' counts an encoder, and none is known in this model; use 'exact'")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return FlopsReport(
        convention,
        batch_size,
        seq_length,
        predicted,
        tuple(layers),
        recomputed=sum(recomputed_by(module, costs) for module in model.modules()),
        updates=None if method is None or schedule is None else _updates(costs, method, schedule),
        optimizer=ADAMW_FLOPS * trained if optimizer else 0,
        not_counted=tuple(_not_counted(model)),
    )


def _check(
    batch_size: int, seq_length: int, predicted: object, method: UpdateRule | None, schedule: Schedule | None
) -> None:
    for name, value in (("batch_size", batch_size), ("seq_length", seq_length)):
        if value < 1:
            raise RegrowError(f"{name} must be at least 1, got {value}")
    fits = isinstance(predicted, int) and 0 <= predicted <= seq_length
    if predicted not in (None, "all") and not fits:
        raise RegrowError(f"predicted must be 'all' or lie between 0 and seq_length={seq_length}, got {predicted!r}")
    if isinstance(method, str):
        raise RegrowError(f"method must be a method, not its name; pass regrow.methods.create({method!r})")
    if (method is None) != (schedule is None):
        raise RegrowError("method and schedule belong together: what an update costs, and when there is one")


def _costs(
    model: nn.Module, batch_size: int, per_sequence: Mapping[Rows, int], given: Mapping[str, int], every_gradient: bool
) -> Iterator[tuple[nn.Module, LayerFlops]]:
    modules = dict(_inside_out(model, "", set()))
    trained = _Trained(model)
    unused = set(given)
    for name, module in modules.items():
        width = attention_width(module)
        if width is not None:
            flops = 4 * batch_size * per_sequence["tokens"] ** 2 * width
            needed = every_gradient or trained.up_to(name)
            tokens = batch_size * per_sequence["tokens"]
            yield module, LayerFlops(name, ATTENTION, tokens, 0, 0, Flops(flops, 2 * flops * needed, 0))
        elif isinstance(module, nn.Embedding):
            yield module, LayerFlops(name, EMBEDDINGS, batch_size * per_sequence["tokens"], 0, 0, Flops())
        elif isinstance(module, nn.Linear | BlockSparseLinear | DenseFactor | SparkFFN):
            place, role = role_of(modules, name)
            globs = [glob for glob in given if fnmatchcase(name, glob)]
            unused -= set(globs[:1])
            rows = batch_size * (given[globs[0]] if globs else per_sequence[role.rows])
            whole, reads_sibling = _whole(modules, name)
            with_input = every_gradient or trained.reaches(place if place != name else whole, role)
            if reads_sibling:
                with_input = with_input or trained.within(whole, name)
            yield module, _layer(name, module, role, rows, with_input, every_gradient)
    if unused:
        raise RegrowError(f"rows[{min(unused)!r}] matches no layer that an earlier glob has not taken")


def _whole(modules: Mapping[str, nn.Module], name: str) -> tuple[str, bool]:
    """The layer that a matrix is part of, and whether it reads what another part made of that layer's input."""
    place, reads_sibling = name, False
    while place:
        parent, _, child = place.rpartition(".")
        outer = modules[parent]
        if isinstance(outer, Composite):
            name, reads_sibling = parent, reads_sibling or child in outer.inner
        place = parent
    return name, reads_sibling


def _inside_out(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules``, but what is in a module comes before it: attention after the layers whose results it takes."""
    if module in seen:
        return
    seen.add(module)
    for child, inner in module.named_children():
        yield from _inside_out(inner, f"{name}.{child}" if name else child, seen)
    yield name, module


def _layer(
    name: str,
    module: nn.Linear | BlockSparseLinear | DenseFactor | SparkFFN,
    role: Role,
    rows: int,
    with_input: bool,
    every_gradient: bool,
) -> LayerFlops:
    if isinstance(module, SparkFFN):
        forward, back, weights = module.flops(rows, with_input)
        counted = Flops(forward, back, weights * (every_gradient or module.gate.requires_grad))
        elements = 2 * module.hidden * module.intermediate
        return LayerFlops(name, role.part, rows, forward // (2 * max(rows, 1)), elements, counted)
    weight = module.values if isinstance(module, BlockSparseLinear) else module.weight
    flops = 2 * rows * weight.numel()
    # Of a learned mask the logits train; their gradient takes that of the weight, which itself may be frozen.
    trained = any(p.requires_grad for own, p in module.named_parameters(recurse=False) if own != "bias")
    counted = Flops(flops, flops * with_input, flops * (every_gradient or trained))
    return LayerFlops(name, role.part, rows, weight.numel(), module.in_features * module.out_features, counted)


class _Trained:
    """Whether a gradient has to go through a place, by the order in which parameters are registered."""

    def __init__(self, model: nn.Module) -> None:
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.trained: list[int] = []
        self.earliest: int | None = None
        self.modules = list(model.named_modules())
        for position, (path, parameter) in enumerate(model.named_parameters(remove_duplicate=False)):
            if parameter.requires_grad:
                self.trained.append(position)
                self.earliest = self.trained[0]
            while path:
                path = path.rpartition(".")[0]
                self.first.setdefault(path, position)
                self.last[path] = position

    def reaches(self, name: str, role: Role) -> bool:
        """Whether what a layer reads depends on anything that is trained."""
        if role.reads is not None:
            place = self.last[name]
            sources = (path for path, module in self.modules if isinstance(module, role.reads))
            read = [path for path in sources if path in self.last and self.last[path] < place]
            if read:
                return self.up_to(read[-1])
        start = self.first[name.rpartition(".")[0] if role.beside else name]
        return self.earliest is not None and self.earliest < start

    def within(self, name: str, part: str) -> bool:
        """Whether something in a module that is registered before a part of it is trained."""
        return any(self.first[name] <= position < self.first[part] for position in self.trained)

    def up_to(self, name: str) -> bool:
        return self.earliest is not None and self.earliest <= self.last[name]


def _updates(costs: Costs, method: UpdateRule, schedule: Schedule) -> UpdateFlops:
    rule = capture = 0
    for module, layer in costs.items():
        if not isinstance(module, BlockSparseLinear) or layer.weights == layer.dense_weights:
            continue  # a layer without a free position is left alone
        size = LayerSize(
            module.in_features, module.out_features, module.block_size, module.values.shape[0], module.block_shape.cols
        )
        rule += method.update_flops(size, layer.rows)
        if method.needs_gradient and module.activation is not None:
            capture += layer.flops.forward  # the layer keeps nothing from before its activation
    steps = schedule.total_steps
    n_updates = sum(schedule.is_update(step) for step in range(1, steps + 1))
    return UpdateFlops(method.name, rule, capture, n_updates, steps)


def _not_counted(model: nn.Module) -> Iterator[NotCounted]:
    known = nn.Linear, BlockSparseLinear, DenseFactor, SparkFFN, nn.Embedding, *_WITHOUT_PRODUCTS
    for name, module in model.named_modules():
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if parameters and not isinstance(module, known) and not has_no_product(module):
            yield NotCounted(name, type(module).__name__, parameters)


def _recomputed(half: nn.Module, costs: Costs) -> int:
    return half.recomputed_flops(costs[half].rows) if isinstance(half, SparkFFN) else 0


register_family(Family({}, {}, recomputed={SparkFFN: _recomputed}))
