"""For authors of layer options: one conformance suite that every option passes, ours and yours.

>>> from regrow.testing import check_layer
>>> check_layer("lowrank").name
'lowrank'
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, densify, named_sparse_layers, sparsify
from regrow.nn.flops import count_flops
from regrow.nn.options import LayerOption, Place, create
from regrow.nn.replace import built_places
from regrow.optim import AdamW
from regrow.training import TopologyUpdater, UpdateSchedule
from regrow.training.loading import RegrowConfig
from regrow.training.skeleton import build_layers

DENSITY, BLOCK, WIDTH, HIDDEN = 0.25, 4, 32, 64
TOKEN_COUNTS = (0, 1, 63)
STEPS = 24
_CLOSE = 1e-10  # relative, in float64


@dataclass(frozen=True)
class LayerReport:
    """What :func:`check_layer` measured.

    Args:
        name: of the option.
        weights, dense_weights: multiplications of a token, forward, through two layers ``32 -> 64 -> 32`` with the
            option, and through the dense ones.
        is_linear: whether it can be densified.
    """

    name: str
    weights: int
    dense_weights: int
    is_linear: bool


def check_layer(layer: str | LayerOption) -> LayerReport:
    """Run the conformance suite over a layer option.

    1. It is declared completely: paper, year, link, help of every option, a worked example in its module.
    2. The same seed gives the same model, the global random state is not touched.
    3. Outputs and all gradients are those of the option's own dense formula in float64, for 0, 1 and 63 tokens.
    4. Its FLOPs are what its ``weights`` say.
    5. A transformers model with it, saved, loaded and saved again, is bitwise the same; so are a deep copy and a state
       dictionary; damaged entries of its configuration are refused.
    6. A small training ends with a finite, lower loss while blocks move, and a resumed one is bitwise the same.
    7. ``densify`` leaves the function as it was, or refuses and changes nothing.

    Args:
        layer: a registered name, or an instance with options.

    Raises:
        AssertionError: saying which rule the option breaks.
    """
    option = create(layer) if isinstance(layer, str) else layer
    check_declaration(option)
    _check_seeds(option)
    _check_function(option)
    weights = _check_flops(option)
    _check_files(option)
    _check_training(option)
    return LayerReport(option.name, weights, 2 * WIDTH * HIDDEN, _check_densify(option))


def network(option: LayerOption, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A feed-forward half with the option, ``32 -> 64 -> 32``."""
    dense = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)).to(dtype)
    return sparsify(dense, density=DENSITY, block_size=BLOCK, layer=option, seed=seed)


def check_declaration(option: object) -> None:
    """Raise :class:`AssertionError` unless a method or an option says of itself what lists and pages tell."""
    cls: Any = type(option)
    for attribute in ("name", "paper", "year", "link"):
        assert getattr(cls, attribute), f"{cls.__name__}.{attribute} is not set"
    assert (cls.__doc__ or "").strip(), f"{cls.__name__} has no docstring; its first line is what users see in lists"
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), f'option {field.name!r} of {cls.name} has no metadata={{"help": ...}}'
    module = sys.modules[cls.__module__]
    assert ">>>" in (module.__doc__ or ""), f"{cls.__module__} has no worked example in its docstring"


def _check_seeds(option: LayerOption) -> None:
    dense = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    state = torch.get_rng_state()
    first, again, other = (
        sparsify(copy.deepcopy(dense), density=DENSITY, block_size=BLOCK, layer=option, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state), (
        f"{option.name} used the global random state; draw from place.generator or place.extra"
    )
    _assert_same(first, again, f"{option.name}: the same seed gave two different models")
    assert any(not torch.equal(a, other[name]) for name, a in first.items() if a.shape == other[name].shape), (
        f"{option.name}: two seeds gave the same model"
    )


def _check_function(option: LayerOption) -> None:
    model = network(option, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():  # what begins with zeros is to be seen, too
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    for n in TOKEN_COUNTS:
        x = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
        cotangent = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
        actual, expected = model(x), _reference(option, model, x)
        assert actual.shape == expected.shape, f"{option.name}: {n} tokens became {list(actual.shape)}"
        _assert_close(actual, expected, f"{option.name}: outputs of {n} tokens")
        inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
        names = ["input", *(name for name, p in model.named_parameters() if p.requires_grad)]
        gradients = [torch.autograd.grad(y, inputs, cotangent, allow_unused=True) for y in (actual, expected)]
        for name, ours, theirs in zip(names, *gradients, strict=True):
            assert ours is not None and theirs is not None, f"{option.name}: {name} has no gradient"
            _assert_close(ours, theirs, f"{option.name}: gradient of {name} with {n} tokens")
    shaped = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=generator)
    _assert_close(
        model(shaped).flatten(0, 1), model(shaped.flatten(0, 1)), f"{option.name}: inputs of three dimensions"
    )


def _reference(option: LayerOption, model: nn.Sequential, x: Tensor) -> Tensor:
    first, activation, second = model
    if option.pairs:
        return option.reference((first, activation, second), x)
    return option.reference((second,), activation(option.reference((first,), x)))


def _check_flops(option: LayerOption) -> int:
    model = network(option)
    report = count_flops(model, batch_size=1, seq_length=7)
    assert not report.not_counted, f"{option.name}: count_flops does not know {report.not_counted[0]}"
    first = Place(WIDTH, HIDDEN, True, BLOCK, DENSITY)
    second = first.of(HIDDEN, WIDTH)
    weights = option.pair_weights(first, second)
    counted = report.products.forward
    assert counted == 2 * 7 * weights, f"{option.name} says {2 * 7 * weights} FLOPs forward, its layers have {counted}"
    return weights


def _check_files(option: LayerOption) -> None:
    model = network(option)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(5))
    _assert_same(model.state_dict(), copy.deepcopy(model).state_dict(), f"{option.name}: a deep copy differs")
    assert torch.equal(model(x), copy.deepcopy(model)(x)), f"{option.name}: a deep copy computes something else"
    other = network(option, seed=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x)), f"{option.name}: a loaded state dictionary computes something else"
    bert = _bert(option)
    ids = torch.arange(6).view(2, 3)
    before = bert(ids).last_hidden_state
    with tempfile.TemporaryDirectory() as folder:
        current = bert
        for name in ("once", "twice"):
            current.save_pretrained(f"{folder}/{name}")
            current = BertModel.from_pretrained(f"{folder}/{name}").eval()
            _assert_same(bert.state_dict(), current.state_dict(), f"{option.name}: saved and loaded {name} it differs")
            assert torch.equal(current(ids).last_hidden_state, before), (
                f"{option.name}: saved and loaded {name} it computes something else"
            )
    _check_refusals(bert)


def _check_refusals(bert: BertModel) -> None:
    """A configuration whose option entries are damaged does not load."""
    document = bert.config.quantization_config
    for name, entry in document.get("options", {}).items():
        damaged: Sequence[dict[str, Any]] = (
            entry | {"option": "no such option"},
            entry | {"fields": {"no such field": 1}},
            entry | {"density": -1.0},
            entry | {"block_size": 3},
            entry | {"numbers": {"odd": 7}},
            {key: value for key, value in entry.items() if key != "fields"},
        )
        for wrong in damaged:
            with torch.device("meta"):
                skeleton = BertModel(BertConfig(**_BERT))
            try:
                config = RegrowConfig(**(document | {"options": document["options"] | {name: wrong}}))
                build_layers(skeleton, config.layers, config.options)
            except RegrowError:
                continue
            raise AssertionError(f"a damaged entry of a configuration is accepted: {wrong}")


_BERT = {
    "vocab_size": 11,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 8,
}


def _bert(option: LayerOption) -> BertModel:
    logging.disable_progress_bar()
    state = torch.get_rng_state()
    bert = BertModel(BertConfig(**_BERT)).eval()
    torch.set_rng_state(state)
    return sparsify(bert, density=DENSITY, block_size=BLOCK, include="encoder.*", layer=option)


class _Run:
    """A network that learns a fixed random map while its blocks move."""

    def __init__(self, option: LayerOption) -> None:
        self.model = network(option)
        if not any(True for _ in named_sparse_layers(self.model)):  # an option without blocks comes behind some
            generator = torch.Generator().manual_seed(7)
            blocks = BlockSparseLinear(WIDTH, WIDTH, block_size=BLOCK, density=DENSITY, generator=generator)
            self.model.insert(0, blocks)
        self.optimizer = AdamW(self.model.parameters(), lr=0.02)
        schedule = UpdateSchedule(STEPS, 6, 0.3)
        self.updater = TopologyUpdater(self.model, self.optimizer, "set", schedule=schedule, seed=2)
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(8, 32, WIDTH, generator=generator)
        self.y = self.x @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def steps(self, count: int) -> float:
        loss = torch.zeros(())
        for _ in range(count):
            index = self.updater.n_steps % len(self.x)
            self.optimizer.zero_grad()
            loss = (self.model(self.x[index]) - self.y[index]).square().mean()
            loss.backward()
            self.optimizer.step()
            self.updater.step()
        return loss.item()

    def resumed(self, option: LayerOption) -> _Run:
        state = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.updater.state_dict()))
        other = _Run(option)
        other.model.load_state_dict(state[0])
        other.optimizer.load_state_dict(state[1])
        other.updater.load_state_dict(state[2])
        return other


def _check_training(option: LayerOption) -> None:
    whole = _Run(option)
    patterns = {name: layer.topology.keys() for name, layer in named_sparse_layers(whole.model)}
    first = whole.steps(1)
    last = whole.steps(STEPS - 1)
    assert 0 <= last < first, f"{option.name}: the loss went from {first:.4f} to {last:.4f} in {STEPS} steps"
    for name, layer in named_sparse_layers(whole.model):
        full = layer.topology.n_blocks == layer.topology.n_positions
        assert full or not torch.equal(layer.topology.keys(), patterns[name]), f"{option.name}: {name} never moved"
    for stop in (5, STEPS // 2 + 1):
        half = _Run(option)
        half.steps(stop)
        half = half.resumed(option)
        half.steps(STEPS - stop)
        what = f"{option.name}: resumed after step {stop} it is not what an uninterrupted training has"
        _assert_same(whole.model.state_dict(), half.model.state_dict(), what)


def _check_densify(option: LayerOption) -> bool:
    model = network(option)
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(6))
    before, state = model(x), copy.deepcopy(model.state_dict())
    refused = any(built.part != "single" for _, _, built in built_places(model))
    try:
        densify(model)
    except RegrowError:
        _assert_same(state, model.state_dict(), f"{option.name}: densify refused, and changed the model")
        return False
    assert not refused, f"{option.name}: densify made plain layers of a feed-forward half"
    assert all(type(model[i]) is nn.Linear for i in (0, 2)), f"{option.name}: densify left something"
    torch.testing.assert_close(model(x), before, msg=f"{option.name}: densify changed the function")
    return True


def _assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    actual, expected = actual.detach(), expected.detach()
    if expected.numel():
        error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
        assert error <= _CLOSE, f"{what} differ from the dense formula's by {error:.1e} (relative)"


def _assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    assert a.keys() == b.keys(), f"{what}: {sorted(a.keys() ^ b.keys())[0]} is in one only"
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{what}: {name}"
