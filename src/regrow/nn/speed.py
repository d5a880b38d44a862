"""What is known of this machine's speed: when a sparse layer beats the dense one.

``regrow advise`` measures and stores; :func:`known_speeds` only reads, so asking costs nothing. The time of a
training step of a sparse layer is close to a straight line in its density ``d``,

    sparse_seconds(d) = fixed_seconds + d * seconds_per_density

and the layer wins below the density at which that meets ``dense_seconds``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from regrow.cache import cache_root
from regrow.kernels.machine import describe_machine


@dataclass(frozen=True)
class LayerSpeed:
    """Seconds of forward + backward of one layer shape at ``tokens`` tokens.

    Example:
        >>> speed = LayerSpeed(512, 512, 16, 4096, dense_seconds=10.0, fixed_seconds=1.0, seconds_per_density=12.0)
        >>> round(speed.speedup(0.1), 2), round(speed.break_even_density, 2)
        (4.55, 0.75)
    """

    in_features: int
    out_features: int
    block_size: int
    tokens: int
    dense_seconds: float
    fixed_seconds: float
    seconds_per_density: float

    def speedup(self, density: float) -> float:
        """Dense seconds over sparse seconds at a density; above 1 sparse wins."""
        return self.dense_seconds / max(self.fixed_seconds + density * self.seconds_per_density, 1e-12)

    @property
    def break_even_density(self) -> float:
        """Sparse wins below this density; 1 if it always does, 0 if it never does."""
        if self.seconds_per_density <= 0:
            return 1.0
        return min(1.0, max(0.0, (self.dense_seconds - self.fixed_seconds) / self.seconds_per_density))


def speeds_file() -> Path:
    """Where this machine's measurements are: processor, threads, instruction set and torch version decide."""
    key = hashlib.blake2b(json.dumps(describe_machine(), sort_keys=True).encode(), digest_size=8).hexdigest()
    return cache_root() / f"speeds-{key}.json"


def known_speeds() -> list[LayerSpeed]:
    """Stored measurements of this machine; none if there are none, or they cannot be read."""
    try:
        rows = json.loads(speeds_file().read_text())
        return [LayerSpeed(**{field.name: row[field.name] for field in fields(LayerSpeed)}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def store_speeds(speeds: Sequence[LayerSpeed]) -> Path:
    """Add measurements to the stored ones; a new one of the same layer replaces the old."""
    merged = {_identity(speed): speed for speed in [*known_speeds(), *speeds]}
    path = speeds_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps([asdict(speed) for speed in merged.values()], indent=1))
    aside.replace(path)
    return path


def _identity(speed: LayerSpeed) -> tuple[int, int, int, int]:
    return speed.in_features, speed.out_features, speed.block_size, speed.tokens
