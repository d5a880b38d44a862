"""The module around a feed-forward half with few active units, and the layer option that builds it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining

from regrow import RegrowError, count_flops, densify, sparsify
from regrow.bert.fused import fuse
from regrow.kernels import spark_ffn
from regrow.nn import BlockSparseLinear, SparkFFN, statistical_top_k
from regrow.nn.options import create

from ..tolerances import assert_same_numbers

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def half(seed: int = 0, **changes: object) -> SparkFFN:
    return SparkFFN(**({"hidden": 48, "intermediate": 200} | changes), generator=torch.Generator().manual_seed(seed))


def model(**changes: object) -> BertForPreTraining:
    torch.manual_seed(0)
    dense = BertForPreTraining(BertConfig(**SMALL)).eval()
    arguments = {"density": 0.5, "block_size": 8, "include": "bert.encoder.*", "layer": "spark"} | changes
    return sparsify(dense, **arguments)


@pytest.mark.parametrize("shape", [(48,), (0, 48), (3, 5, 48)])
def test_any_leading_dimensions(shape):
    x, layer = torch.randn(shape), half()
    for weight in (layer.gate, layer.up, layer.down):  # outputs of about one
        weight.data *= 20
    y = layer(x).detach()
    exact = create("spark").reference([layer.double()], x.double().view(-1, 48)).detach().view(shape)
    assert_same_numbers(y, exact)


def test_as_many_parameters_as_two_linear_layers():
    for bias in (True, False):
        dense = [nn.Linear(48, 200, bias), nn.Linear(200, 48, bias)]
        expected = sum(p.numel() for layer in dense for p in layer.parameters())
        assert sum(p.numel() for p in half(bias=bias, r=7).parameters()) == expected


def test_the_same_seed_draws_the_same_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    for a, b in zip(half().parameters(), half().parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(half().gate, half(seed=1).gate)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_moves_only_the_columns_of_active_units():
    """And all gates, because the threshold moves with each of them."""
    layer, x = half(), torch.randn(1, 48)
    layer(x).square().sum().backward()
    active = statistical_top_k(F.linear(x[:, :24], layer.gate), 0.08)[0] > 0
    assert 0 < active.sum() < 40 and layer.active_units(x).tolist() == [int(active.sum())]
    for grad in (layer.up.grad, layer.down.grad):
        assert torch.equal(grad.abs().sum(1) > 0, active)
    assert (layer.gate.grad.abs().sum(1) > 0).all()


def test_it_learns():
    torch.manual_seed(0)
    layer, teacher, x = half(keep=0.2), nn.Linear(48, 48), torch.randn(256, 48)
    optimizer, losses = torch.optim.AdamW(layer.parameters(), lr=1e-2), []
    for _ in range(60):
        loss = F.mse_loss(layer(x), teacher(x).detach())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_autocast_computes_in_the_dtype_of_the_weights():
    layer, x = half(), torch.randn(4, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), half()(x))
        weights = layer.gate, layer.gate_bias, layer.up, layer.down, layer.down_bias
        assert torch.equal(spark_ffn(x, *weights, layer.quantile), layer(x))  # nothing is cast inside the operator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, "keep must lie between 0 and 1"),
        ({"keep": 1.0}, "keep must lie between 0 and 1"),
        ({"r": 0}, "r must lie between 0 and hidden=48"),
        ({"r": 48}, "r must lie between 0 and hidden=48"),
        ({"hidden": 1}, "hidden must be at least 2"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(RegrowError, match=message):
        half(**changes)


def test_the_wrong_width_is_named():
    with pytest.raises(RegrowError, match="expects inputs of 48 features"):
        half()(torch.ones(2, 47))


# ---- as a layer option ----------------------------------------------------------------------------------


def test_halves_are_replaced_and_attention_is_in_blocks():
    layer = model().bert.encoder.layer[0]
    assert isinstance(layer.intermediate.dense, SparkFFN) and layer.intermediate.dense.r == 16
    assert isinstance(layer.output.dense, nn.Identity)
    assert isinstance(layer.attention.self.query, BlockSparseLinear) and layer.attention.self.query.density == 0.5
    plain = model(layer="blocks").bert.encoder.layer[0].attention.self.query
    assert torch.equal(layer.attention.self.query.values, plain.values)  # of the first layer, drawn before any half


def test_fused_is_the_same():
    ids = torch.randint(0, 50, (3, 7))
    expected = model()(ids).prediction_logits
    torch.testing.assert_close(fuse(model())(ids).prediction_logits, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    ids, saved = torch.randint(0, 50, (3, 7)), model(layer=create("spark", keep=0.2, decide=0.25))
    saved.save_pretrained(tmp_path)
    loaded = BertForPreTraining.from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[1].intermediate.dense.keep == 0.2
    assert loaded.bert.encoder.layer[1].intermediate.dense.r == 8
    assert torch.equal(loaded(ids).prediction_logits, saved(ids).prediction_logits)


def test_only_the_active_share_is_counted():
    layer = SparkFFN(64, 100, keep=0.1)
    report = count_flops(nn.Sequential(nn.Linear(64, 64), layer), batch_size=2, seq_length=5)
    found = report.layers[1]
    assert found.flops.forward == 2 * 10 * (32 * 100 + 10 * 32 + 10 * 64) and found.dense_weights == 2 * 64 * 100
    # Back from the output to the units, and on to the input; and the same of the weights; r x r matrices in either.
    assert found.flops.input_gradient == found.flops.weight_gradient == 2 * (2 * 10 * 10 * 64 + 32 * 32 * (10 + 100))
    assert not report.not_counted and report.recomputed == 2 * 10 * 10 * 32
    place = create("spark", keep=0.1)
    counted = count_flops(model(layer=place), batch_size=1, seq_length=1, predicted="all")
    halves = [layer for layer in counted.layers if layer.name.endswith("intermediate.dense")]
    assert [h.flops.forward for h in halves] == [2 * (16 * 64 + 6 * (16 + 32))] * 2


def test_no_dense_layer_stands_for_it():
    with pytest.raises(RegrowError, match=r"intermediate\.dense is of layer 'spark'"):
        densify(model())


def test_a_half_that_ends_in_another_width_is_refused():
    with pytest.raises(RegrowError, match="64 -> 128 -> 32"):
        sparsify(
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)), density=0.5, block_size=8, layer="spark"
        )


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"decide": 0.0}])
def test_bad_options_are_named(options):
    with pytest.raises(RegrowError, match=f"{next(iter(options))} must lie between"):
        create("spark", **options)
