"""Weight transforms: each conforms, and each does what its paper's formula says."""

import math

import pytest
import torch
from torch import nn

from regrow import count_flops
from regrow.errors import RegrowError
from regrow.methods import WeightTransform, available, create, method_class
from regrow.methods.maskllm import masks
from regrow.methods.nm import nm_mask, strongest_mask
from regrow.methods.pdp import soft_mask, threshold
from regrow.methods.sste import soft_threshold
from regrow.nn import TransformedLinear, harden, transform_linears
from regrow.nn.transformed import LayerView, Moment
from regrow.testing_transforms import check_transform

TRANSFORMS = [name for name in available() if issubclass(method_class(name), WeightTransform)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_conforms(name: str) -> None:
    check_transform(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("srste", {"n": 1, "m": 8}),
        ("pgf", {"kind": "exponential"}),
        ("pgf", {"kind": "structure", "n": 1, "m": 8}),
        ("maskllm", {"n": 1, "prior": 0.0}),
        ("masksparsity", {"begin": 0.0, "end": 1.0}),
        ("pdp", {"begin": 0.0, "end": 1.0}),
    ],
)
def test_every_option_conforms(name: str, options: dict) -> None:
    check_transform(create(name, **options), ranks=1)


def test_the_family_is_all_there() -> None:
    assert TRANSFORMS == ["maskllm", "masksparsity", "pdp", "pgf", "srste", "sste"]


def layer_of(
    name: str, weight: torch.Tensor, density: float = 0.5, block_size: int = 1, **options
) -> TransformedLinear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data.copy_(weight)
    return transform_linears(dense, create(name, **options), density=density, block_size=block_size)


def view_of(layer: TransformedLinear, progress: float) -> LayerView:
    layer.moment = Moment(round(progress * 1000), 1000)
    return layer.view


# ---- n of m ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (4, 4)])
def test_the_mask_keeps_the_strongest_of_every_group_along_the_input(n: int, m: int) -> None:
    weight = torch.randn(6, 16)
    kept = nm_mask(weight, n, m).view(-1, m)
    for sizes, chosen in zip(weight.abs().view(-1, m), kept, strict=True):
        assert sorted(sizes[chosen].tolist()) == sorted(sizes.topk(n).values.tolist())


def test_ties_go_to_the_first() -> None:
    assert nm_mask(torch.ones(2, 8), 2, 4).tolist() == [[True, True, False, False] * 2] * 2
    assert strongest_mask(torch.ones(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]


# ---- srste ----------------------------------------------------------------------------------------


def test_srste_pruned_weights_shrink_by_lr_times_lambda() -> None:
    """Under a zero gradient plain SGD takes w to w - lr * lambda * w outside the mask, and nothing from inside."""
    weight, lr, pull = torch.randn(8, 16), 0.5, 0.125  # powers of two: exact
    layer = layer_of("srste", weight, pruned_decay=pull)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    layer(torch.zeros(3, 16)).sum().backward()
    optimizer.step()
    kept = nm_mask(weight, 2, 4)
    assert torch.equal(layer.weight[kept], weight[kept])
    torch.testing.assert_close(layer.weight[~kept], weight[~kept] * (1 - lr * pull), rtol=1e-6, atol=0)


def test_srste_the_gradient_of_the_effective_weight_goes_to_all_weights() -> None:
    layer, x, g = layer_of("srste", torch.randn(8, 16), pruned_decay=0.0), torch.randn(5, 16), torch.randn(5, 8)
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, g.T @ x)


def test_srste_several_backward_passes_pull_as_much_as_one() -> None:
    gradients = []
    for passes in (1, 4):
        layer = layer_of("srste", torch.linspace(-1, 1, 32).view(2, 16))
        layer.moment = Moment(backward_passes=passes)
        for _ in range(passes):
            layer(torch.zeros(1, 16)).sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients)


# ---- pgf ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "progress", "factor"),
    [
        ({"rate": 2.0}, 0.0, 1.0),
        ({"rate": 2.0}, 0.25, 0.5),
        ({"rate": 2.0}, 0.75, 0.0),
        ({"kind": "exponential", "rate": 3.0}, 0.5, math.exp(-1.5)),
        ({"kind": "exponential"}, 1.0, math.exp(-10)),
    ],
)
def test_pgf_weights_outside_the_mask_and_their_gradients_fade(options: dict, progress: float, factor: float) -> None:
    weight = torch.randn(4, 8)
    layer = layer_of("pgf", weight, **options)
    effective = create("pgf", **options).effective(view_of(layer, progress))
    expected = torch.where(nm_mask(weight, 2, 4), 1.0, factor)
    torch.testing.assert_close(effective, weight * expected)
    effective.sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize(
    ("n", "m", "frames"),
    [(2, 4, (3, 2)), (1, 4, (3, 2, 1)), (1, 16, (15, 8, 4, 2, 1)), (3, 8, (7, 4, 3)), (3, 4, (3,)), (1, 2, (1,))],
)
def test_pgf_structure_decays_over_equal_frames(n: int, m: int, frames: tuple) -> None:
    method = create("pgf", kind="structure", n=n, m=m)
    assert method.frames == frames
    layer = layer_of("pgf", torch.randn(4, 2 * m), kind="structure", n=n, m=m)
    for index, kept in enumerate(frames):
        for inside in (0.01, 0.99):
            effective = method.effective(view_of(layer, (index + inside) / len(frames)))
            assert ((effective != 0).view(-1, m).sum(1) == kept).all()


# ---- sste -----------------------------------------------------------------------------------------


def test_sste_subtracts_the_second_smallest_magnitude() -> None:
    weight = torch.randn(6, 12)
    expected = torch.empty_like(weight)
    for i, group in enumerate(weight.view(-1, 4)):
        t = group.abs().sort().values[1]
        expected.view(-1, 4)[i] = group.sign() * (group.abs() - t).clamp_min(0)
    assert torch.equal(soft_threshold(weight), expected)


def test_sste_is_continuous_where_two_weights_change_places() -> None:
    before, after = (soft_threshold(torch.tensor([[1.0, 2.0 + e, 2.0 - e, 3.0]])) for e in (-1e-5, 1e-5))
    torch.testing.assert_close(before, after, rtol=0, atol=5e-5)
    hard = [nm_mask(torch.tensor([[1.0, 2.0 + e, 2.0 - e, 3.0]]), 2, 4) for e in (-1e-5, 1e-5)]
    assert not torch.equal(*hard)  # which a hard mask is not


def test_sste_beta_is_the_best_and_stays_while_weights_move() -> None:
    weight = torch.randn(6, 12)
    layer = layer_of("sste", weight)
    beta, soft = layer.beta.item(), soft_threshold(weight)
    errors = [(weight - b * soft).square().sum().item() for b in (beta - 0.01, beta, beta + 0.01)]
    assert errors[1] == min(errors)
    layer.weight.data.mul_(3).add_(torch.randn(6, 12))
    assert layer.beta.item() == beta
    layer(torch.ones(1, 12)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(6, 12))  # straight through
    assert layer_of("sste", torch.zeros(2, 4)).beta.item() == 1.0


def test_sste_leaves_attention_alone() -> None:
    from regrow.bert.model import build_model
    from regrow.bert.sizes import bert_config

    model = build_model(
        bert_config("1/64", vocab_size=60, max_length=16), density=0.5, block_size=16, transform=create("sste")
    )
    found = [name for name, module in model.named_modules() if isinstance(module, TransformedLinear)]
    assert found == ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"]


# ---- pdp ------------------------------------------------------------------------------------------


def test_pdp_the_mask_is_a_half_at_the_threshold() -> None:
    t = torch.tensor(0.03)
    assert soft_mask(torch.tensor([t, -t]), t, tau=1e-4).tolist() == [0.5, 0.5]
    inner, outer = soft_mask(torch.tensor([0.02, -0.04]), t, tau=1e-4).tolist()
    assert inner == pytest.approx(1 / (1 + math.exp(5))) and outer == pytest.approx(1 / (1 + math.exp(-7)))


@pytest.mark.parametrize(("progress", "kept"), [(0.1, 64), (0.45, 38), (0.7, 13), (1.0, 13)])
def test_pdp_the_threshold_lies_between_what_goes_and_what_stays(progress: float, kept: int) -> None:
    weight = torch.randn(4, 16)
    method = create("pdp", tau=1e-9)  # so cold that the mask is all but hard
    effective = method.effective(view_of(layer_of("pdp", weight, density=0.2), progress))
    assert int((effective.abs() > 1e-6).sum()) == kept  # 64 * (1 - .8 * (p - .2) / .5)
    if kept < 64:
        sizes = weight.abs().flatten().sort().values
        assert threshold(weight, kept).item() == pytest.approx((sizes[63 - kept] + sizes[64 - kept]).item() / 2)


def test_pdp_the_gradient_goes_through_the_mask() -> None:
    layer = layer_of("pdp", torch.tensor([[0.01, 0.02, 0.03, 0.04]]), tau=1e-3)
    method = layer.transform
    method.effective(view_of(layer, 1.0)).sum().backward()
    w = layer.weight.detach()
    m = soft_mask(w, torch.tensor(0.025), 1e-3)
    torch.testing.assert_close(layer.weight.grad, m + w * m * (1 - m) * 2 * w / 1e-3)


# ---- masksparsity ---------------------------------------------------------------------------------


def test_masksparsity_only_doomed_blocks_decay_and_then_they_are_gone() -> None:
    weight, pull = torch.randn(8, 8), 2.0**-7
    layer = layer_of("masksparsity", weight, density=0.25, block_size=4, doomed_decay=pull)
    method = layer.transform
    assert not method.advance_(view_of(layer, 0.2)) and not layer.doomed.any()
    assert method.advance_(view_of(layer, 0.25)) and layer.doomed.sum() == 3
    norms = weight.abs().view(2, 4, 2, 4).sum((1, 3))
    assert norms[~layer.doomed].item() == norms.max().item()
    chosen = layer.doomed.clone()
    layer.weight.data.copy_(torch.randn(8, 8))
    assert not method.advance_(view_of(layer, 0.5)) and torch.equal(layer.doomed, chosen)  # once and for all
    doomed = chosen.repeat_interleave(4, 0).repeat_interleave(4, 1)
    layer(torch.zeros(1, 8)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.where(doomed, pull * layer.weight.sign(), 0.0))
    assert torch.equal(layer.effective(), layer.weight)
    layer.weight.grad = None
    effective = method.effective(view_of(layer, 0.75))
    assert torch.equal(effective, layer.weight * ~doomed)
    effective.sum().backward()
    assert torch.equal(layer.weight.grad, (~doomed).float())


# ---- maskllm --------------------------------------------------------------------------------------


def test_maskllm_has_six_masks_of_two_in_four() -> None:
    assert masks(2, 4).sum(1).tolist() == [2.0] * 6 and len({tuple(mask) for mask in masks(2, 4).tolist()}) == 6
    layer = layer_of("maskllm", torch.randn(3, 8))
    assert layer.logits.shape == (6, 6) and layer.logits.requires_grad and not layer.weight.requires_grad


@pytest.mark.parametrize(("progress", "temperature", "scale"), [(0.0, 4.0, 100.0), (0.5, 2.025, 300.0)])
def test_maskllm_is_a_gumbel_softmax_over_the_masks(progress: float, temperature: float, scale: float) -> None:
    layer = layer_of("maskllm", torch.randn(3, 8))
    view = view_of(layer, progress)
    uniform = torch.rand(6, 6, generator=view.moment.generator())
    mixture = torch.softmax((scale * layer.logits - (-uniform.log()).log()) / temperature, dim=1)
    expected = layer.weight * (mixture @ masks(2, 4)).view(3, 8)
    torch.testing.assert_close(layer.transform.effective(view), expected)


def test_maskllm_at_the_end_a_draw_is_all_but_one_mask_and_evaluation_takes_the_greatest_logit() -> None:
    torch.manual_seed(0)
    layer = layer_of("maskllm", torch.randn(3, 8))
    layer.logits.data[:, 4] += 1.0
    effective = layer.transform.effective(view_of(layer, 1.0))
    expected = layer.weight * torch.tensor([0.0, 1.0, 0.0, 1.0] * 2)
    torch.testing.assert_close(effective, expected)
    assert torch.equal(layer.eval().effective(), expected)


def test_maskllm_draws_depend_on_seed_and_step_alone() -> None:
    layer = layer_of("maskllm", torch.randn(3, 8))
    draws = []
    for seed in (1, 2, 1):
        layer.moment = Moment(seed=seed)
        draws.append(layer.effective())
        torch.rand(1)
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_maskllm_begins_near_the_strongest_weights_by_its_prior() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    agreement = [
        (layer_of("maskllm", weight, prior=prior).eval().effective() != 0).eq(nm_mask(weight, 2, 4)).float().mean()
        for prior in (0.0, 3.0, 100.0)
    ]
    assert agreement[0] < 0.6 < 0.9 < agreement[1] < agreement[2] == 1.0


# ---- layers, models, refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_layer_counts_as_a_dense_one(name: str) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))

    dense, transformed = net(), transform_linears(net(), create(name), density=0.2, block_size=4)
    reports = [count_flops(model, batch_size=2, seq_length=5) for model in (dense, transformed)]
    assert reports[0].products == reports[1].products and not reports[1].not_counted


def test_hardening_keeps_bias_mode_and_parameters() -> None:
    layer = layer_of("maskllm", torch.randn(4, 8))
    weight = layer.weight
    hard = harden(nn.Sequential(layer).eval())[0]
    assert type(hard) is nn.Linear and hard.bias is None and not hard.training and not hard.weight.requires_grad
    assert torch.equal(hard.weight[hard.weight != 0], weight[hard.weight != 0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("srste", {"n": 4}, "0 < n < m"),
        ("srste", {"pruned_decay": -1}, "pruned_decay must be >= 0"),
        ("pgf", {"m": 1}, "0 < n < m"),
        ("pgf", {"kind": "cubic"}, "kind must be one of linear, exponential, structure"),
        ("pgf", {"rate": 0}, "rate must be positive"),
        ("pdp", {"tau": 0}, "tau must be positive"),
        ("pdp", {"begin": 0.8}, "begin must be less than end"),
        ("masksparsity", {"end": 1.5}, r"end must lie in \[0, 1\]"),
        ("masksparsity", {"doomed_decay": -1}, "doomed_decay must be >= 0"),
        ("maskllm", {"n": 8, "m": 16}, "8:16 has 12870 masks"),
        ("maskllm", {"final_temperature": 0}, "final_temperature must be positive"),
        ("maskllm", {"prior": -1}, "prior must be >= 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        create(name, **options)


def test_layers_that_do_not_suit_are_refused_and_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(RegrowError, match="1: srste keeps 2 of every 4 inputs, and 4 does not divide in_features=6"):
        transform_linears(model, create("srste"))
    with pytest.raises(RegrowError, match=r"^0: block_size 4 does not divide out_features=6"):
        transform_linears(model, create("masksparsity"), density=0.5, block_size=4)
    with pytest.raises(RegrowError, match="method 'pdp' needs a density"):
        transform_linears(model, create("pdp"))
    with pytest.raises(RegrowError, match=r"no nn\.Linear that srste transforms"):
        transform_linears(model, create("srste"), include="encoder.*")
    with pytest.raises(RegrowError, match="meta device"):
        transform_linears(nn.Linear(8, 8, device="meta"), create("srste"))
    assert all(type(layer) is nn.Linear for layer in model)
    with pytest.raises(RegrowError, match="srste trains dense layers"):
        create("srste").propose(None)


def test_the_suite_fails_transforms_that_break_its_rules() -> None:
    srste = method_class("srste")

    def breaks(**changes: object) -> WeightTransform:
        return type("Odd", (srste,), {"__doc__": "Odd.", "__module__": srste.__module__, **changes})()

    def keeps_one_more(self: WeightTransform, layer: LayerView) -> torch.Tensor:
        return layer.weight * nm_mask(layer.weight, 3, 4)

    def draws(self: WeightTransform, layer: LayerView) -> torch.Tensor:
        return layer.weight * nm_mask(layer.weight, 2, 4) + 0 * torch.rand(1)

    def shrinks(self: WeightTransform, layer: LayerView) -> torch.Tensor:
        layer.weight.data.mul_(1.0 + 2.0**-20)
        return layer.weight * nm_mask(layer.weight, 2, 4)

    def detached(self: WeightTransform, layer: LayerView) -> torch.Tensor:
        return layer.weight * 0.0

    for changes, complaint in (
        ({"final": keeps_one_more}, "exactly 2 of every 4"),
        ({"effective": draws}, "global random state"),
        ({"effective": shrinks}, "two different weights"),
        ({"effective": detached}, "zero everywhere"),
        ({"always_sparse": True}, "must say so"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            check_transform(breaks(**changes), ranks=1)
