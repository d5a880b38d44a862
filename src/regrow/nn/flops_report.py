"""What :func:`regrow.count_flops` found: layers, parts, totals, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Convention = Literal["exact", "paper"]
_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1.0, "FLOP"))
_TITLE, _COLUMN = 34, 16


@dataclass(frozen=True)
class Flops:
    """FLOPs of a training step by direction; a multiply-add is two."""

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    @property
    def total(self) -> int:
        """Of all three."""
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )


@dataclass(frozen=True)
class LayerFlops:
    """One layer, or the two products of one attention.

    Args:
        name: of the module.
        part: of the model it belongs to.
        rows: vectors that go through it in a step.
        weights: elements that exist and are multiplied; 0 for attention, whose factors are both activations.
        dense_weights: elements of the same weight when dense.
        flops: of a step.
    """

    name: str
    part: str
    rows: int
    weights: int
    dense_weights: int
    flops: Flops


@dataclass(frozen=True)
class UpdateFlops:
    """What moving the topology costs.

    Args:
        method: its name.
        rule: of one update of all layers, as :meth:`regrow.methods.Method.update_flops` says.
        capture: of one update: products repeated to show a method gradients before an activation.
        n_updates, total_steps: how often.
    """

    method: str
    rule: int
    capture: int
    n_updates: int
    total_steps: int

    @property
    def per_update(self) -> int:
        """Rule and capture."""
        return self.rule + self.capture

    @property
    def per_step(self) -> float:
        """Spread over all steps of the training."""
        return self.per_update * self.n_updates / self.total_steps


@dataclass(frozen=True)
class NotCounted:
    """A module with parameters of its own whose products, if any, are not in the count."""

    name: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of a training step: see :func:`regrow.count_flops`, which makes it; ``str(report)`` is a table.

    Args:
        convention: what is counted, ``"exact"`` or ``"paper"``.
        batch_size, seq_length: of a step.
        predicted: positions of a sequence that a vocabulary head computes.
        layers: every layer and every attention, in the model's order.
        recomputed: FLOPs of a step that compute again what was computed before; in no total.
        updates: of the topology; None if no method was given.
        optimizer: of a step; 0 if it was not asked for.
        not_counted: modules with parameters that are not understood.
    """

    convention: Convention
    batch_size: int
    seq_length: int
    predicted: int
    layers: tuple[LayerFlops, ...]
    recomputed: int = 0
    updates: UpdateFlops | None = None
    optimizer: int = 0
    not_counted: tuple[NotCounted, ...] = ()

    @property
    def parts(self) -> dict[str, Flops]:
        """Sums over the layers of each part, in the model's order."""
        sums: dict[str, Flops] = {}
        for layer in self.layers:
            sums[layer.part] = sums.get(layer.part, Flops()) + layer.flops
        return sums

    @property
    def products(self) -> Flops:
        """Of all layers: forward and backward pass of a step."""
        return sum(self.parts.values(), Flops())

    @property
    def per_step(self) -> float:
        """Products, optimizer, and updates spread over the training."""
        return self.products.total + self.optimizer + (self.updates.per_step if self.updates else 0)

    @property
    def per_sequence(self) -> float:
        """``per_step`` over the batch size."""
        return self.per_step / self.batch_size

    def density(self, part: str) -> float:
        """Share of the weights of a part's layers that exist; 1 where there are none.

        >>> layers = (LayerFlops("up", "encoder layers", 8, 10, 40, Flops(160, 160, 160)),)
        >>> FlopsReport("exact", 1, 8, 1, layers).density("encoder layers")
        0.25
        """
        layers = [layer for layer in self.layers if layer.part == part]
        dense = sum(layer.dense_weights for layer in layers)
        return sum(layer.weights for layer in layers) / dense if dense else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, totals included, as JSON can hold it."""
        updates = self.updates
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("layers", "updates")},
            "per_step": self.per_step,
            "per_sequence": self.per_sequence,
            "products": _as_dict(self.products),
            "parts": {name: _as_dict(flops) | {"density": self.density(name)} for name, flops in self.parts.items()},
            "updates": updates and asdict(updates) | {"per_update": updates.per_update, "per_step": updates.per_step},
            "layers": [asdict(layer) | {"flops": _as_dict(layer.flops)} for layer in self.layers],
        }

    def __str__(self) -> str:
        unit, name = next((u, n) for u, n in _UNITS if max(self.per_step, 1) >= u)
        lines = [
            f"one training step of {self.batch_size} x {self.seq_length} tokens, convention {self.convention}",
            _line(name, ["forward", "input gradient", "weight gradient", "total", "share"]),
        ]
        for part, flops in self.parts.items():
            density = self.density(part)
            title = f"{part}, density {density:.4g}" if density < 1 else part
            lines.append(self._row(title, flops, unit))
        lines.append(self._row("all products", self.products, unit))
        if self.updates:
            lines.append(self._total(f"topology updates ({self.updates.method})", self.updates.per_step, unit))
        if self.optimizer:
            lines.append(self._total("optimizer", self.optimizer, unit))
        lines += [self._total("a step", self.per_step, unit), self._total("a sequence", self.per_sequence, unit)]
        if self.recomputed:
            lines.append(self._total("computed again, not counted", self.recomputed, unit))
        if self.updates:
            u = self.updates
            lines.append(
                f"one update: {u.per_update / unit:.4g} {name}; {u.n_updates} updates in {u.total_steps} steps"
            )
        lines += [f"not counted: {x.name or 'the model'} ({x.kind}, {x.parameters:,})" for x in self.not_counted]
        return "\n".join(lines)

    def _row(self, title: str, flops: Flops, unit: float) -> str:
        numbers = [flops.forward, flops.input_gradient, flops.weight_gradient, flops.total]
        return _line(title, [*(_number(number / unit) for number in numbers), self._share(flops.total)])

    def _total(self, title: str, number: float, unit: float) -> str:
        share = self._share(number) if title != "a sequence" else ""
        return _line(title, ["", "", "", _number(number / unit), share])

    def _share(self, number: float) -> str:
        return f"{number / self.per_step:.1%}" if self.per_step else ""


def _as_dict(flops: Flops) -> dict[str, int]:
    return asdict(flops) | {"total": flops.total}


def _number(value: float) -> str:
    return f"{value:#.4g}" if value else "0"


def _line(title: str, columns: Sequence[str]) -> str:
    return (f"{title:{_TITLE}}" + "".join(f"{column:>{_COLUMN}}" for column in columns)).rstrip()
