"""What stands in the place of a linear layer: each option's own rules, and the suite that all pass.

>>> "the suite wants an example in the module of every option"[:9]
'the suite'
"""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow import BlockSparseLinear, RegrowError, TopologyUpdater, UpdateSchedule, count_flops, densify, sparsify
from regrow.methods import available as methods
from regrow.methods import create as create_method
from regrow.nn import named_sparse_layers
from regrow.nn.options import Composite, LayerOption, Place, available, create, layer_class
from regrow.nn.options.base import dense_weight
from regrow.nn.options.permuted import PermutedLinear, penalty, tangent
from regrow.nn.replace import built_places, dense_elements, feed_forward_pairs
from regrow.nn.sparsify import sparse_skeleton
from regrow.optim import AdamW, parameter_groups
from regrow.testing import check_layer

VARIANTS = [
    create("lowrank", rank=3, alpha=1.5),
    create("permuted", permutation="random"),
    create("permuted", permutation="identity"),
    create("permuted", harden_by=2.0, threshold=0.0),  # soft to the end
    create("permuted", threshold=9.0),  # hard after one step
]
ISO = ("doped", "factorized", "wide")


def half(width: int = 32, hidden: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def sparse_half(layer: str | LayerOption, **options: object) -> nn.Sequential:
    block_size = (create(layer) if isinstance(layer, str) else layer).block_size or 4
    return sparsify(half(), layer=layer, seed=1, **({"density": 0.25, "block_size": block_size} | options))


def train(model: nn.Module, steps: int, method: str = "static", lr: float = 0.02, total: int = 20) -> TopologyUpdater:
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    updater = TopologyUpdater(model, optimizer, method, schedule=UpdateSchedule(total, 5, 0.3), seed=2)
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(16, 32, generator=draw)
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        updater.step()
    return updater


# ---- all options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [*available(), *VARIANTS], ids=str)
def test_every_option_conforms(layer: str | LayerOption) -> None:
    report = check_layer(layer)
    assert report.is_linear == (not layer_class(report.name).pairs)


@pytest.mark.parametrize("method", [name for name in methods() if not create_method(name).dense_layout])
@pytest.mark.parametrize("layer", ["lowrank", "parallel", "permuted"])
def test_every_method_moves_the_blocks_inside(layer: str, method: str) -> None:
    density = 0.5 if method == "gmp" else 0.25
    model = sparse_half(layer, density=density)
    before = {name: set(part.topology.keys().tolist()) for name, part in named_sparse_layers(model)}
    train(model, 20, method)
    for name, part in named_sparse_layers(model):
        assert (set(part.topology.keys().tolist()) != before[name]) == create_method(method).moves, name
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_learned_parts_get_the_rates_of_dense_weights() -> None:
    model = sparse_half("lowrank")
    groups = parameter_groups(model, 0.1, lr=1.0)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model[0].up.weight)] == rate[id(model[0].sparse.bias)] == 1.0
    assert rate[id(model[0].sparse.values)] > 3


def test_what_the_dense_model_has_is_counted_by_what_was_replaced() -> None:
    expected = sum(p.numel() for p in half().parameters())
    for name in available():
        if name != "parallel":  # whose second layer is a plain one
            assert dense_elements(sparse_half(name)) == expected, name
    assert dense_elements(sparse_half("parallel")) == expected


def test_options_are_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(RegrowError, match=r"unknown layer 'odd'; choose one of blocks, doped, factorized"):
        sparse_half("odd")
    with pytest.raises(RegrowError, match=r"layer 'lowrank' has no option 'rang'; its options: rank, alpha"):
        create("lowrank", rang=3)
    with pytest.raises(RegrowError, match="0: rank 33 is more than a layer 32 -> 64 can have"):
        sparse_half(create("lowrank", rank=33))
    with pytest.raises(RegrowError, match="init='keep' is for layer='blocks'"):
        sparse_half("lowrank", init="keep")
    for name, options, message in (
        ("lowrank", {"rank": 0}, "rank must be at least 1"),
        ("lowrank", {"alpha": math.nan}, "alpha must be positive"),
        ("permuted", {"permutation": "odd"}, "permutation must be 'identity', 'random' or 'learned'"),
        ("permuted", {"penalty": -1.0}, "penalty must be >= 0"),
        ("permuted", {"sweeps": 0}, "sweeps must lie between"),
    ):
        with pytest.raises(RegrowError, match=message):
            create(name, **options)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(RegrowError, match=r"LowRankLinear expects inputs of 32 features, got shape \[2, 31\]"):
        sparse_half("lowrank")[0](torch.zeros(2, 31))


def test_a_second_call_leaves_what_an_option_built() -> None:
    model = nn.Sequential(*sparse_half("lowrank"), nn.Linear(32, 32))
    sparsify(model, density=0.5, block_size=4)
    assert [type(module).__name__ for module in model] == [
        "LowRankLinear",
        "GELU",
        "LowRankLinear",
        "BlockSparseLinear",
    ]


def test_autocast_computes_in_the_weights_type() -> None:
    model = sparse_half("lowrank")
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](torch.ones(2, 32, dtype=torch.bfloat16))
    assert y.dtype is torch.float32


# ---- low rank -----------------------------------------------------------------------------------------


def test_low_rank_begins_as_the_blocks_alone_and_a_static_support_stays() -> None:
    plain, model = sparse_half("blocks"), sparse_half("lowrank")
    x = torch.randn(7, 32)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model[2].sparse.values, plain[2].values)
    assert torch.equal(model[2].sparse.topology.keys(), plain[2].topology.keys())
    train(model, 20)
    assert bool(model[0].up.weight.any())
    assert torch.equal(model[0].sparse.topology.keys(), plain[0].topology.keys())


def test_low_rank_counts_its_narrow_products() -> None:
    model = sparsify(nn.Sequential(nn.Linear(64, 32)), density=0.25, block_size=16, layer=create("lowrank", rank=4))
    report = count_flops(model, batch_size=3, seq_length=5)
    assert report.products.forward == 2 * 15 * (2 * 256 + 4 * (64 + 32))
    # The first layer has no gradient to its input, but its second narrow matrix has one to the first's output.
    assert report.products.input_gradient == 2 * 15 * 4 * 32
    assert report.products.weight_gradient == report.products.forward


# ---- as many products as dense ------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ISO)
@pytest.mark.parametrize("density", [0.03, 0.1, 0.3, 0.45])
def test_iso_flop_layers_have_the_products_of_dense_ones(layer: str, density: float) -> None:
    with torch.device("meta"):
        model, dense = half(768, 3072), half(768, 3072)
    sparse_skeleton(model, density=density, block_size=16, layer=layer)
    ours, theirs = (count_flops(m, batch_size=1, seq_length=1).products.forward for m in (model, dense))
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(("density", "k"), [(0.03, 33), (0.1, 10), (0.3, 3), (0.45, 2)])
def test_parallel_branches_have_the_products_of_the_layer_they_replace(density: float, k: int) -> None:
    with torch.device("meta"):
        model = half(768, 3072)
    sparse_skeleton(model, density=density, block_size=16, layer="parallel")
    first, second = count_flops(model, batch_size=1, seq_length=1).layers
    assert model[0].k == k
    assert first.flops.forward == pytest.approx(2 * 768 * 3072, rel=0.01)
    assert second.flops.forward == pytest.approx(2 * 768 * 3072 * density, rel=0.01)


def test_parallel_branches_sum_after_any_activation() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    sparsify(model, density=0.25, block_size=4, layer="parallel")
    x, branches = torch.randn(5, 32), model[0].branches
    parts = F.linear(x, branches.to_dense(), branches.bias).tanh().chunk(4, 1)
    torch.testing.assert_close(model[0](x), sum(parts))
    assert torch.equal(model[1](x), x)


def test_options_for_feed_forward_halves_want_one() -> None:
    with pytest.raises(RegrowError, match="layer 'wide' replaces feed-forward halves, and the chosen layers hold none"):
        sparsify(half(), density=0.25, block_size=4, include="0", layer="wide")
    with pytest.raises(RegrowError, match="more than 64 times as wide"):
        sparse_half("wide", density=0.001)
    with pytest.raises(RegrowError, match="leaves no rank"):
        sparse_half("doped", density=1.0)
    with pytest.raises(RegrowError, match="0 is of layer 'wide'"):
        densify(sparse_half("wide"))


def test_halves_are_found_by_name_and_in_sequences() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
    found = feed_forward_pairs(bert)
    assert [pair.first for pair in found] == [f"encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    assert found[1].second == "encoder.layer.1.output.dense"
    apart = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 4))
    assert feed_forward_pairs(apart) == []


@pytest.mark.parametrize("layer", ["doped", "factorized"])
def test_products_of_two_matrices_begin_as_large_as_a_dense_layer(layer: str) -> None:
    model = sparsify(nn.Sequential(nn.Linear(256, 256, bias=False)), density=0.1, block_size=16, layer=layer)
    assert float(model[0].to_dense().std()) == pytest.approx(0.02, rel=0.2)


# ---- permutations -------------------------------------------------------------------------------------


def learned(**options: object) -> tuple[nn.Sequential, PermutedLinear]:
    model = sparse_half(create("permuted", **options))
    return model, model[0]


def test_the_identity_is_the_blocks_alone_and_a_random_order_shuffles_their_inputs() -> None:
    x = torch.randn(4, 32)
    plain, model = sparse_half("blocks"), sparse_half(create("permuted", permutation="identity"))
    assert torch.equal(model(x), plain(x)) and model[0].permutation is None
    random = sparse_half(create("permuted", permutation="random"))[0]
    assert torch.equal(random(x), plain[0](x[:, random.permutation.long()]))
    assert not torch.equal(random.permutation, torch.arange(32))


def test_the_penalty_joins_the_gradient_and_nobody_has_to_know() -> None:
    x, gradients = torch.randn(6, 32), []
    for strength in (0.0, 0.5):
        model, layer = learned(penalty=strength)
        model(x).sum().backward()
        gradients.append(layer.shuffle.weight.grad)
    matrix = layer.shuffle.weight.detach().clone().requires_grad_()
    (-torch.linalg.vector_norm(matrix, dim=0).sum() - torch.linalg.vector_norm(matrix, dim=1).sum()).backward()
    torch.testing.assert_close(gradients[1] - gradients[0], tangent(0.5 * matrix.grad))
    for d in (0, 1):
        torch.testing.assert_close(gradients[0].sum(d), torch.zeros(32), atol=1e-5, rtol=0)
    assert penalty(torch.eye(3)) == 0 and penalty(torch.full((4, 4), 0.25)) == 8 * (1 - 0.5)


def test_a_learned_order_stays_doubly_stochastic_and_hardens_below_the_threshold() -> None:
    model, layer = learned(harden_by=9.0, threshold=0.22, penalty=0.1)
    soft = []
    for _ in range(40):
        train(model, 1, lr=0.002)
        soft.append(layer.shuffle is not None)
        if soft[-1]:
            for d in (0, 1):
                torch.testing.assert_close(layer.shuffle.weight.sum(d), torch.ones(32), atol=1e-3, rtol=0)
            assert float(penalty(layer.shuffle.weight.detach())) / 32 >= 0.22
    assert soft[0] and not soft[-1], "it must harden while the penalty pulls"
    assert layer.permutation.sort().values.tolist() == list(range(32))


def test_hardening_keeps_the_nearest_order_and_forgets_the_matrix() -> None:
    model, layer = learned(harden_by=0.5, threshold=0.0)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    layer.shuffle.weight.data = 0.9 * torch.eye(32)[order] + 0.1 / 32
    weight, x = layer.shuffle.weight, torch.randn(3, 32)
    train(model, 9, lr=0.0)  # of 20 steps
    assert layer.shuffle is not None
    updater = train(model, 10, lr=0.0)
    assert layer.shuffle is None and torch.equal(layer.permutation.long(), order)
    assert torch.equal(layer(x), layer.sparse(x[:, order]))
    assert weight.numel() == 0 and all(p.numel() for p in updater.optimizer.state)


def test_a_permutation_that_names_an_input_twice_is_refused() -> None:
    model, _ = learned(permutation="random")
    state = copy.deepcopy(model.state_dict())
    state["0.permutation"][0] = state["0.permutation"][1]
    with pytest.raises(RegrowError, match=r"0\.permutation must name each of 32 inputs exactly once"):
        model.load_state_dict(state)
    state["0.permutation"] = torch.arange(32)
    with pytest.raises(RegrowError, match=r"0\.permutation must be int32"):
        model.load_state_dict(state)


# ---- the suite ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wrong(LayerOption):
    """An option that breaks a rule.

    >>> _Wrong().name
    'wrong'
    """

    name, paper, year, link = "wrong", "none", 2026, "nowhere"
    rule: str = field(default="", metadata={"help": "which"})

    def build(self, place: Place) -> nn.Module:
        if self.rule == "global randomness":
            torch.rand(1)
        return _Doubled(place, self.rule)

    def weights(self, place: Place) -> int:
        return super().weights(place) * (2 if self.rule == "flops" else 1)


class _Doubled(Composite):
    def __init__(self, place: Place, rule: str) -> None:
        super().__init__(place.in_features, place.out_features)
        self.rule, self.sparse = rule, place.blocks()

    def compute(self, x: Tensor) -> Tensor:
        if self.rule == "stuck":
            return self.sparse(x).detach() + 0 * self.sparse(x)
        return self.sparse(x) * (1.001 if self.rule == "function" else 1)

    def dense_weight(self) -> Tensor:
        return dense_weight(self.sparse)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("global randomness", "global random state"),
        ("function", "differ from the dense formula's"),
        ("stuck", "gradient of"),
        ("flops", "FLOPs forward"),
    ],
)
def test_an_option_that_breaks_a_rule_fails(rule: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_layer(_Wrong(rule))


def test_an_undeclared_option_fails() -> None:
    @dataclass(frozen=True)
    class Anonymous(LayerOption):
        """Nothing."""

    with pytest.raises(AssertionError, match="name is not set"):
        check_layer(Anonymous())


def test_blocks_are_what_sparsify_always_made() -> None:
    model = sparse_half("blocks")
    assert type(model[0]) is BlockSparseLinear and not list(built_places(model))
    assert layer_class("blocks").always_sparse
