"""Input columns that are left out token by token."""

import json

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from pretraining import config
from regrow import RegrowError, sparsify
from regrow.bert import skipping
from regrow.bert.activations import activation_sparsity
from regrow.bert.fused import fuse
from regrow.bert.inference import prepare
from regrow.bert.pretrain import pretrain
from regrow.bert.skipping import column_norms, skip_activations
from regrow.cli import main
from regrow.methods import create

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
RULES = ["wina", "teal", "cats"]
IDS = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))


def bert(density: float | None = None, **changes: object) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**(SMALL | changes))).eval()
    if density is not None:
        sparsify(model, density=density, block_size=8, include="encoder.*", init="magnitude")
    return model


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state


def seen(model: BertModel, layer: nn.Module, rule: str, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into a layer, what is left of it, and what comes out."""
    found: list[Tensor] = []
    before = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
    after = layer.register_forward_hook(lambda _, inputs, y: found.append(y.flatten(0, -2)))
    with skip_activations(model, rule, keep):
        answer(model)
        hooks = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, skipping._Cut)]
        cuts = [vars(layer)["forward"].cut] if "forward" in vars(layer) else hooks
    before.remove()
    after.remove()
    x, y = found
    return x, cuts[0].of(x) if cuts else x, y


@pytest.mark.parametrize("rule", ["wina", "teal"])
def test_the_error_of_orthogonal_columns_is_what_was_dropped(rule):
    model = bert()
    layer = model.encoder.layer[0].intermediate.dense
    norms = torch.linspace(0.1, 3, 32)
    layer.weight.data = torch.linalg.qr(torch.randn(64, 64)).Q[:, :32] * norms
    x, left, y = seen(model, layer, rule, 0.4)
    error = (layer(x) - y).square().sum(1)
    dropped = (x.square() * (left == 0) * norms.square()).sum(1)
    torch.testing.assert_close(error, dropped)
    score = x.abs() * norms if rule == "wina" else x.abs()
    best = score.topk(13).indices.sort(1).values
    assert torch.equal((left != 0).nonzero()[:, 1].view(-1, 13), best)


def test_norms_make_the_error_smaller():
    """Where a large input meets a small column and the other way round, and columns are orthogonal."""
    errors = {}
    for rule in ("wina", "teal"):
        model = bert()
        layer = model.encoder.layer[0].intermediate.dense
        typical = seen(model, layer, rule, 1.0)[0].abs().mean(0)
        layer.weight.data = torch.linalg.qr(torch.randn(64, 64)).Q[:, :32] / typical.square()
        x, _, y = seen(model, layer, rule, 0.5)
        errors[rule] = (layer(x) - y).norm(dim=1)
    assert (errors["wina"] <= errors["teal"] * (1 + 1e-5)).all() and errors["wina"].sum() < 0.9 * errors["teal"].sum()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("rule", RULES)
def test_all_of_it_is_bitwise_the_whole_model_and_so_is_what_is_taken_back(rule, density, fused):
    model = bert(density)
    if fused:
        fuse(model)
    whole = answer(model)
    with skip_activations(model, rule, 1.0):
        assert torch.equal(answer(model), whole)
    with skip_activations(model, rule, 0.5) as skipping:
        assert not torch.equal(answer(model), whole)
    assert torch.equal(answer(model), whole)
    per_layer = 1 if rule == "cats" else 6
    assert len(skipping.layers) == 2 * per_layer


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_model_skips_the_same(rule, density):
    model, fused = bert(density), fuse(bert(density))
    with skip_activations(model, rule, 0.6), skip_activations(fused, rule, 0.6):
        torch.testing.assert_close(answer(fused), answer(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_columns_that_are_not_read_are_as_good_as_zeros(rule, monkeypatch, isa, threads):
    model = bert()
    with skip_activations(model, rule, 0.6):
        few = answer(model)
        monkeypatch.setattr(skipping, "FEW_TOKENS", 0)
        torch.testing.assert_close(few, answer(model), rtol=1e-4, atol=1e-5)


def test_a_weight_that_changes_is_read_anew():
    model = bert()
    layer = model.encoder.layer[0].intermediate.dense
    with skip_activations(model, "teal", 0.6):
        before = answer(model)
        with torch.no_grad():
            layer.weight.mul_(2)
        changed = answer(model)
    with skip_activations(model, "teal", 0.6):
        assert torch.equal(answer(model), changed) and not torch.equal(changed, before)


def test_gradients_go_to_what_stays():
    model = bert()
    layer = model.encoder.layer[1].output.dense
    with skip_activations(model, "cats", 0.5):
        model(IDS[:1, :1]).last_hidden_state[..., 0].sum().backward()
    assert (layer.weight.grad.abs().sum(0) > 0).sum() == 32


@pytest.mark.parametrize("rule", ["wina", "teal"])
def test_whole_block_columns_stay_or_go(rule):
    model = bert(0.4)
    layer = model.encoder.layer[0].intermediate.dense
    gone = layer.topology.coordinates()[1] == 0
    rows, cols = layer.topology.coordinates()
    free = [(r, c) for r in range(8) for c in (1, 2, 3) if not ((rows == r) & (cols == c)).any()]
    for slot, (r, c) in zip(gone.nonzero().squeeze(1).tolist(), free, strict=False):
        rows[slot], cols[slot] = r, c
    layer.topology.set_coordinates(rows, cols)  # no block reads the first eight inputs now
    x, left, _ = seen(model, layer, rule, 0.5)
    norms = layer.to_dense().norm(dim=0)
    torch.testing.assert_close(column_norms(layer), norms)
    score = (x * norms if rule == "wina" else x).view(-1, 4, 8).square().sum(2)
    best = score[:, 1:].topk(2, 1).indices + 1  # half of three, to even
    kept = torch.zeros(len(x), 4, dtype=torch.bool).scatter_(1, best, True)
    assert torch.equal(left, x * kept.repeat_interleave(8, 1))


def test_hidden_activations_alone():
    model = bert()
    layer = model.encoder.layer[1]
    x, left, _ = seen(model, layer.output.dense, "cats", 0.25)
    assert torch.equal((left != 0).sum(1), torch.full((21,), 16))
    assert x.abs().masked_fill(left != 0, 0).amax(1).le(left.abs().masked_fill(left == 0, 9).amin(1)).all()
    x, left, _ = seen(model, layer.intermediate.dense, "cats", 0.25)
    assert torch.equal(x, left)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (bert, {"rule": "deja-vu"}, "rule must be one of wina, teal, cats"),
        (bert, {"keep": 0.0}, "keep must lie in"),
        (bert, {"keep": 1.1}, "keep must lie in"),
        (lambda: nn.Linear(2, 2), {}, "no BERT encoder"),
        (lambda: prepare(bert(0.5)), {}, "no BERT encoder"),
        (lambda: sparsify(bert(), density=0.5, block_size=8, include="encoder.*", layer="spark"), {}, "is SparkFFN"),
    ],
)
def test_what_cannot_be_is_refused(model, arguments, message):
    with pytest.raises(RegrowError, match=message):
        skip_activations(model(), **arguments)


def test_twice_is_refused_and_nothing_is_left_behind():
    model = bert()
    whole = answer(model)
    with skip_activations(model), pytest.raises(RegrowError, match="skips activations already"):
        skip_activations(model, "cats")
    assert torch.equal(answer(model), whole)


def test_halves_without_hidden_activations_are_named():
    model = sparsify(bert(), density=0.5, block_size=8, include="encoder.*", layer="spark")
    with pytest.raises(RegrowError, match="takes no hidden activations"):
        activation_sparsity(model, lambda: 0.0)


def test_evaluate_tells_what_skipping_costs(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    pretrain(config(corpus, run, size="1/32/2"), create("dynsparse"))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--skip", "wina", "--keep", "0.3,1", "--json", str(tmp_path / "e.json")]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    some, whole = found.pop("skipping")
    assert whole == {"keep": 1.0, **found} and some["keep"] == 0.3 and some["mlm_loss"] != found["mlm_loss"]
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert lines[0].split()[:4] == ["keep", "(wina)", "mlm", "loss"] and [line.split()[0] for line in lines[1:]] == [
        "0.3",
        "1",
        "1",
    ]
    assert float(lines[1].split()[1]) == pytest.approx(some["mlm_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "0.5"], "name the rule with --skip"),
        (["--skip", "wina", "--keep", "0.5,2"], r"--keep must lie in (0, 1], got 2"),
        (["--skip", "wina", "--against", "x"], "leave out --against"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
