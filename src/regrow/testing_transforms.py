"""For authors of methods that transform dense weights: one conformance suite that every one of them passes.

>>> from regrow.testing_transforms import check_transform
>>> report = check_transform("srste", ranks=1)
>>> report.name, report.kept
('srste', 0.5)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.methods import WeightTransform, create
from regrow.methods.catalog import entry
from regrow.nn import TransformedLinear, harden, named_transformed_layers, transform_linears
from regrow.nn.transformed import Moment
from regrow.optim import AdamW
from regrow.testing import _check_ranks, check_declaration
from regrow.training import UpdateSchedule
from regrow.training.transformed import TransformedTraining

STEPS, TOKENS, DENSITY, BLOCK = 32, 16, 0.3, 4
"""Of the small training. Methods that keep N of every M have a density of their own."""


@dataclass(frozen=True)
class TransformReport:
    """What :func:`check_transform` measured.

    Args:
        name: of the method.
        kept: share of the weights that are not zero in the end.
        first_loss, last_loss: of the small problem, evaluated before and after training.
    """

    name: str
    kept: float
    first_loss: float
    last_loss: float


def check_transform(method: str | WeightTransform, *, ranks: int = 2) -> TransformReport:
    """Run the conformance suite over a method that transforms dense weights.

    1. It is declared completely, not as always sparse, and every listing says that it saves nothing.
    2. At any time of a training the effective weight has the weight's shape and is finite; its gradient reaches what
       trains, finite, and nothing that is frozen; the final weight keeps exactly N of every M, or the density to the
       block. The same moment gives the same weight, nothing that the method looks at changes, the global random state
       included.
    3. A small training ends with a lower evaluated loss. Evaluated is what is saved: the hardened model computes
       bitwise the same. A resumed training is bitwise the uninterrupted one.
    4. Two ranks with different data end with the same weights and state.

    Args:
        method: a registered name, or an instance with options.
        ranks: 1 skips the two processes.

    Raises:
        AssertionError: saying which rule the method breaks.
    """
    created = create(method) if isinstance(method, str) else method
    assert isinstance(created, WeightTransform), f"{created.name} is no WeightTransform"
    check_declaration(created)
    _check_listings(created)
    for step in range(5):
        _check_layer(created, Moment(step, 4, seed=step))
    report = _check_training(created)
    if ranks > 1:
        _check_ranks(created, _train_rank)
    return report


def _check_listings(method: WeightTransform) -> None:
    name = method.name
    assert method.dense_layout and not method.always_sparse, f"{name} trains dense weights and must say so"
    assert entry(method).kind == "control", f"{name} would be listed among the methods that move blocks"


# ---- 2: one layer at one moment -------------------------------------------------------------------


def _check_layer(method: WeightTransform, moment: Moment) -> None:
    name = method.name
    torch.manual_seed(moment.seed)
    model = transform_linears(nn.Sequential(nn.Linear(32, 12)), method, density=DENSITY, block_size=BLOCK, seed=1)
    ((_, layer),) = named_transformed_layers(model)
    random_state = torch.get_rng_state()
    with torch.no_grad():
        for step in range(moment.step + 1):  # what the method keeps is to be of this moment
            layer.moment = Moment(step, moment.total_steps, step)
            method.advance_(layer.view)
    layer.moment = moment
    wrong = method.wrong_state(layer.view)
    assert wrong is None, f"{name} refuses a state that it made itself: {wrong}"
    before = copy.deepcopy(layer.state_dict())
    effective = layer.effective()
    assert effective.shape == layer.weight.shape, f"{name}: the effective weight has another shape"
    assert bool(effective.isfinite().all()), f"{name}: the effective weight is not finite"
    assert torch.equal(effective, layer.effective()), f"{name}: the same moment gave two different weights"
    _check_gradients(method, layer, effective)
    _check_final(method, layer)
    same = all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert same, f"{name} changed what it looked at; only advance_ may"
    assert torch.equal(torch.get_rng_state(), random_state), (
        f"{name} used the global random state; draw from moment.generator()"
    )


def _check_gradients(method: WeightTransform, layer: TransformedLinear, effective: Tensor) -> None:
    effective.square().sum().backward()
    for key, parameter in layer.named_parameters():
        if key == "bias":
            continue
        if not parameter.requires_grad:
            assert method.frozen and parameter.grad is None, f"{method.name}: {key} is frozen but gets a gradient"
            continue
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, (
            f"{method.name}: {key} trains but gets no gradient"
        )
        assert bool(parameter.grad.isfinite().all()), f"{method.name}: the gradient of {key} is not finite"
        assert bool(parameter.grad.any()), f"{method.name}: the gradient of {key} is zero everywhere"


def _check_final(method: WeightTransform, layer: TransformedLinear) -> None:
    final = method.final(layer.view)
    assert final.shape == layer.weight.shape and bool(final.isfinite().all()), f"{method.name}: final is not a weight"
    if method.pattern is not None:
        n, m = method.pattern
        kept = (final != 0).view(-1, m).sum(1)
        assert bool((kept == n).all()), f"{method.name}: final does not keep exactly {n} of every {m} weights"
        return
    lacking = abs(int((final != 0).sum()) - layer.density * final.numel())
    assert lacking <= layer.block_size**2 / 2, f"{method.name}: final does not keep the density {layer.density}"


# ---- 3: training, hardening, resume ---------------------------------------------------------------


class _Run:
    """A two-layer network that learns a fixed random map."""

    def __init__(self, method: WeightTransform, rank: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        transform_linears(self.model, method, density=DENSITY, block_size=BLOCK, seed=1)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(trained, lr=0.02)
        self.training = TransformedTraining(self.model, method, schedule=UpdateSchedule(STEPS, 1), seed=2)
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(8, TOKENS, 32, generator=generator)
        self.y = self.x @ torch.randn(32, 32, generator=generator) / 32**0.5
        self.rank = rank

    def steps(self, count: int) -> None:
        self.model.train()
        for _ in range(count):
            index = (self.training.n_steps * 2 + self.rank) % len(self.x)
            self.optimizer.zero_grad()
            (self.model(self.x[index]) - self.y[index]).square().mean().backward()
            if dist.is_available() and dist.is_initialized():
                for parameter in (p for p in self.model.parameters() if p.grad is not None):
                    dist.all_reduce(parameter.grad)
                    parameter.grad.div_(dist.get_world_size())  # type: ignore[union-attr]
            self.optimizer.step()
            self.training.step()

    @torch.no_grad()
    def evaluated(self) -> Tensor:
        return self.model.eval()(self.x)

    def loss(self) -> float:
        return (self.evaluated() - self.y).square().mean().item()

    def state(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.training.state_dict()))

    def load(self, state: Any) -> None:
        model, optimizer, training = state
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.training.load_state_dict(training)


def _check_training(method: WeightTransform) -> TransformReport:
    name, whole = method.name, _Run(method)
    whole.training.start()
    first = whole.loss()
    whole.steps(STEPS)
    last, kept = whole.loss(), whole.training.coverage
    assert 0 <= last < first, f"{name}: the evaluated loss went from {first:.4f} to {last:.4f} in {STEPS} steps"
    for at in (STEPS // 2 + 1, STEPS - 1):
        half, resumed = _Run(method), _Run(method)
        half.training.start()
        half.steps(at)
        resumed.load(half.state())
        resumed.steps(STEPS - at)
        for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{name}: after a resume {key} is not what an uninterrupted training has"
    for _, layer in named_transformed_layers(whole.model):
        _check_final(method, layer)
    evaluated = whole.evaluated()
    hard = harden(whole.model)
    assert not list(named_transformed_layers(hard)) and torch.equal(hard(whole.x), evaluated), (
        f"{name}: what is saved is not what was evaluated"
    )
    return TransformReport(name, kept, first, last)


def _train_rank(method: WeightTransform, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    run = _Run(method, rank)
    run.training.start()
    run.steps(STEPS // 2)
    torch.save(run.model.state_dict(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
