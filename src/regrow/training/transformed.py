"""Carries out a :class:`~regrow.methods.WeightTransform`: tells the layers where the training is, step by step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.methods import WeightTransform
from regrow.nn.transformed import Moment, named_transformed_layers
from regrow.training import checks
from regrow.training.agreement import check_agreement
from regrow.training.ddp import unwrapped
from regrow.training.metrics import UpdateRecord
from regrow.training.schedule import UpdateSchedule
from regrow.training.seeds import mix


class TransformedTraining:
    """Moves every :class:`~regrow.nn.TransformedLinear` of a model on; the interface is TopologyUpdater's.

    Call :meth:`start` once and :meth:`step` after each ``optimizer.step()``; :func:`regrow.nn.harden` makes the result
    an ordinary model. What the layers keep travels with the weights of a checkpoint; the rest follows from the number
    of steps.

    Args:
        schedule: of which only the number of steps matters.
        seed: of the draws.
        backward_passes: how many add up to the gradient of one step.

    Raises:
        RegrowError: the model has no such layer, or it was made for another method.

    Example:
        >>> from regrow.methods import create
        >>> from regrow.nn import transform_linears
        >>> method = create("pgf", kind="structure", n=1)
        >>> layer = transform_linears(nn.Linear(4, 1), method)
        >>> training = TransformedTraining(layer, method, schedule=UpdateSchedule(total_steps=3, n_updates=1))
        >>> training.start()
        >>> for _ in range(3):
        ...     print(int((layer.effective() != 0).sum()), "of 4")
        ...     _ = training.step()
        3 of 4
        2 of 4
        1 of 4
    """

    def __init__(
        self,
        model: nn.Module,
        method: WeightTransform,
        *,
        schedule: UpdateSchedule,
        seed: int = 0,
        backward_passes: int = 1,
    ) -> None:
        self.layers = dict(named_transformed_layers(unwrapped(model)))
        if not self.layers:
            raise RegrowError(
                f"method {method.name!r} needs transformed layers; call regrow.nn.transform_linears first"
            )
        for name, layer in self.layers.items():
            if layer.transform != method:
                raise RegrowError(f"{name or 'the layer'} was made for {layer.transform}, not for {method}")
        self.method, self.schedule, self.seed, self.backward_passes = method, schedule, seed, backward_passes
        self.n_steps = 0

    def start(self) -> None:
        """Before the first step; a resumed training calls :meth:`load_state_dict` instead."""
        self._move()
        self._advance()
        self._check_agreement()

    def step(self) -> list[UpdateRecord]:
        """Count one optimizer step."""
        self.n_steps += 1
        self._move()
        if self._advance():
            self._check_agreement()
        return []

    @property
    @torch.no_grad()
    def coverage(self) -> float:
        """Share of the transformed weights that would be kept if training ended now."""
        weights = [self.method.final(layer.view) for layer in self.layers.values()]
        return sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The number of steps."""
        return {"counters": torch.tensor([self.n_steps])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; the model's weights and what the layers keep must have been loaded before.

        Raises:
            RegrowError: the state belongs to another kind of training, or a layer keeps what no training leaves.
        """
        counters = state.get("counters")
        if counters is None or counters.shape != (1,) or counters.dtype != torch.int64 or len(state) != 1:
            raise RegrowError("topology state does not belong to a training with transformed weights")
        if not 0 <= int(counters) <= self.schedule.total_steps:
            raise RegrowError(f"counters are {int(counters)} steps of {self.schedule.total_steps}")
        self.n_steps = int(counters)
        self._move()
        for name, layer in self.layers.items():
            wrong = checks.wrong_transform_state(layer.state) or self.method.wrong_state(layer.view)
            if wrong:
                raise RegrowError(f"{name}.{wrong}")

    def _move(self) -> None:
        for name, layer in self.layers.items():
            seed = mix(self.seed, self.n_steps, name)
            layer.moment = Moment(self.n_steps, self.schedule.total_steps, seed, self.backward_passes)

    @torch.no_grad()
    def _advance(self) -> bool:
        changed = [self.method.advance_(layer.view) for layer in self.layers.values()]
        return any(changed)

    def _check_agreement(self) -> None:
        kept = {name: list(layer.state.values()) for name, layer in self.layers.items()}
        check_agreement(kept, f"after step {self.n_steps}")
