"""Carries out a :class:`~regrow.methods.DenseLayoutMethod`: which blocks of dense layers train, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.methods import DenseLayoutMethod
from regrow.nn import MaskedLinear
from regrow.training.agreement import check_agreement
from regrow.training.ddp import unwrapped
from regrow.training.metrics import UpdateRecord
from regrow.training.schedule import UpdateSchedule
from regrow.training.seeds import mix


class MaskedTraining:
    """Masks every :class:`~regrow.nn.MaskedLinear` of a model while it trains; the interface is TopologyUpdater's.

    Call :meth:`start` once and :meth:`step` after each ``optimizer.step()``. Masks travel with the weights of a
    checkpoint; the rest follows from the number of steps.

    Raises:
        RegrowError: the model has no such layer.

    Example:
        >>> from regrow.methods import create
        >>> layer = MaskedLinear(32, 32, block_size=16, density=0.25)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> training = MaskedTraining(layer, create("acdc"), schedule=UpdateSchedule(total_steps=4, n_updates=4))
        >>> training.start()
        >>> for _ in range(4):
        ...     print(int(layer.mask.sum()), "of", layer.n_positions)
        ...     layer(torch.ones(1, 32)).sum().backward()
        ...     optimizer.step()
        ...     _ = training.step()
        4 of 4
        1 of 4
        4 of 4
        1 of 4
    """

    def __init__(self, model: nn.Module, method: DenseLayoutMethod, *, schedule: UpdateSchedule, seed: int = 0) -> None:
        self.layers = {
            name: layer for name, layer in unwrapped(model).named_modules() if isinstance(layer, MaskedLinear)
        }
        if not self.layers:
            raise RegrowError(f"method {method.name!r} needs masked dense layers; call regrow.nn.mask_linears first")
        self.method, self.schedule, self.seed = method, schedule, seed
        self.n_steps = 0

    def start(self) -> None:
        """Begin the first phase; a resumed training calls :meth:`load_state_dict` instead."""
        self._begin(self.method.phase(self.schedule, 0))

    def step(self) -> list[UpdateRecord]:
        """Count one optimizer step; hold what does not train, and begin the next phase if it is time."""
        before = self.method.phase(self.schedule, self.n_steps)
        self.n_steps += 1
        for layer in self.layers.values():
            layer.hold_()
        after = self.method.phase(self.schedule, self.n_steps)
        if after != before and self.n_steps < self.schedule.total_steps:
            self._begin(after)
        return []

    @property
    def coverage(self) -> float:
        """Share of the blocks that train now."""
        masks = [layer.mask for layer in self.layers.values()]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def state_dict(self) -> dict[str, Tensor]:
        """The number of steps."""
        return {"counters": torch.tensor([self.n_steps])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; the model's weights and masks must have been loaded before.

        Raises:
            RegrowError: the state belongs to another kind of training.
        """
        counters = state.get("counters")
        if counters is None or counters.shape != (1,) or counters.dtype != torch.int64 or len(state) != 1:
            raise RegrowError("topology state does not belong to a training with masked dense layers")
        self.n_steps = int(counters)
        dense = self.method.phase(self.schedule, min(self.n_steps, self.schedule.total_steps - 1)) is None
        for name, layer in self.layers.items():
            n_active = layer.n_positions if dense else layer.n_active
            if int(layer.mask.sum()) != n_active:
                raise RegrowError(f"{name}.mask must hold {n_active} blocks in step {self.n_steps}")
            layer.remember()

    def _begin(self, phase: int | None) -> None:
        for name, layer in self.layers.items():
            if phase is None:
                mask = torch.ones_like(layer.mask)
            else:
                generator = torch.Generator().manual_seed(mix(self.seed, phase, name))
                mask = self.method.choose(layer.block_sums(), layer.n_active, generator)
            layer.set_mask_(mask, unused=self.method.unused)
        check_agreement({name: [layer.mask] for name, layer in self.layers.items()}, f"after step {self.n_steps}")
