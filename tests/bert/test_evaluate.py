"""What `regrow evaluate` says of pre-trained models and of pairs of models."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from pretraining import config, lines_with_clock
from regrow import RegrowError, sparsify
from regrow.bert.activations import activation_sparsity
from regrow.bert.changes import changes
from regrow.bert.fused import fuse
from regrow.bert.heldout import HeldOut
from regrow.bert.model import BertForPreTraining, build_model
from regrow.bert.perplexity import pseudo_perplexity
from regrow.bert.pretrain import pretrain
from regrow.cli import main
from regrow.methods import create
from regrow.nn import named_sparse_layers

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    pretrain(config(corpus, path, size="1/32/2"), create("dynsparse"))
    return path


def test_a_run_is_evaluated_to_what_its_log_says(run, corpus, capsys):
    logged = [line for line in lines_with_clock(run) if "eval_mlm_loss" in line][-1]
    heldout = HeldOut(run, config(corpus, run)).losses()
    assert heldout["mlm_loss"] == pytest.approx(logged["eval_mlm_loss"], rel=1e-6)
    assert main(["evaluate", str(run)]) == 0
    shown = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    assert float(shown["mlm loss"]) == pytest.approx(heldout["mlm_loss"], abs=1e-4)


def test_pseudo_perplexity_is_that_of_one_masked_word_at_a_time():
    model = build_model(BertConfig(**SMALL), density=0.5, block_size=8).eval()
    sequences = [torch.tensor([2, 10, 11, 12, 3]), torch.tensor([2, 20, 3])]
    found = pseudo_perplexity(model, sequences, mask_id=4, special_ids=[0, 1, 2, 3, 4], batch_size=2)
    losses = []
    for ids in sequences:
        for place in range(1, len(ids) - 1):
            masked = ids.clone()
            masked[place] = 4
            hidden = model.bert(masked[None]).last_hidden_state[0, place]
            losses.append(F.cross_entropy(model.cls.predictions(hidden), ids[place]).item())
    assert found == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    with pytest.raises(RegrowError, match="no token to predict"):
        pseudo_perplexity(model, [torch.tensor([2, 3])], mask_id=4, special_ids=[2, 3])


def encoder_and_loss(act: str, density: float | None):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, hidden_act=act)).eval()
    with torch.no_grad():
        for layer in model.encoder.layer:  # so that leaving out activations changes something
            layer.output.dense.weight.mul_(20)
    if density is not None:
        sparsify(model, density=density, block_size=8, include="encoder.*", init="magnitude")
    ids = torch.randint(5, 50, (8, 16))
    with torch.no_grad():
        whole = model(ids).last_hidden_state
    return model, lambda: F.mse_loss(model(ids).last_hidden_state, whole).item()


def test_without_a_price_only_zeros_are_left_out():
    model, loss = encoder_and_loss("relu", None)
    zeros, total = [], []

    def look(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        zeros.append(int((inputs[0] == 0).sum()))
        total.append(inputs[0].numel())

    for layer in model.encoder.layer:
        layer.output.dense.register_forward_pre_hook(look)
    loss()
    share = sum(zeros) / sum(total)
    assert 0.2 < share < 0.8
    found = activation_sparsity(model, loss, p=0.0)
    assert found.share == pytest.approx(share) and found.loss_after == pytest.approx(found.loss_before, abs=1e-10)


@pytest.mark.parametrize("density", [None, 0.5])
def test_a_higher_price_leaves_out_more(density):
    model, loss = encoder_and_loss("gelu", density)
    found = [activation_sparsity(model, loss, p=p) for p in (0.0, 0.01, 0.1)]
    shares = [sparsity.share for sparsity in found]
    assert shares == sorted(shares) and shares[0] < shares[1] < shares[2]
    for sparsity, p in zip(found, (0.0, 0.01, 0.1), strict=True):
        assert math.exp(sparsity.loss_after - sparsity.loss_before) <= 1 + p + 1e-9
        assert set(sparsity.by_layer) == {f"encoder.layer.{n}.output.dense" for n in range(2)}


def test_activations_do_not_depend_on_the_order_of_neurons():
    model, loss = encoder_and_loss("gelu", None)
    found = activation_sparsity(model, loss, p=0.05)
    order = torch.randperm(64)
    for layer in model.encoder.layer:
        layer.intermediate.dense.weight.data = layer.intermediate.dense.weight.data[order]
        layer.intermediate.dense.bias.data = layer.intermediate.dense.bias.data[order]
        layer.output.dense.weight.data = layer.output.dense.weight.data[:, order]
    assert activation_sparsity(model, loss, p=0.05).share == pytest.approx(found.share, abs=0.002)


def test_neurons_that_nothing_reads_are_left_out():
    model, loss = encoder_and_loss("gelu", None)
    model.encoder.layer[0].output.dense.weight.data[:, :16] = 0.0
    assert activation_sparsity(model, loss, p=0.0).by_layer["encoder.layer.0.output.dense"] == pytest.approx(0.25)


def test_a_fused_model_is_refused():
    with pytest.raises(RegrowError, match="fused"):
        activation_sparsity(fuse(BertModel(BertConfig(**SMALL))), lambda: 0.0)


def test_moved_blocks_are_no_changed_values():
    before = build_model(BertConfig(**SMALL), density=0.5, block_size=8, seed=1)
    after = build_model(BertConfig(**SMALL), density=0.5, block_size=8, seed=1)
    after.load_state_dict(before.state_dict())
    layers = dict(named_sparse_layers(after))
    for layer in layers.values():  # other slots, the same blocks
        order = torch.randperm(layer.topology.n_blocks)
        rows, cols = layer.topology.coordinates()
        layer.values.data = layer.values.data[order]
        layer.topology.set_coordinates(rows[order], cols[order])
    found = changes(before, after)
    assert found["all"].equal == found["sparse weights"].small == 1.0 and found["sparse weights"].churn == 0.0
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = layers[name]
    free = layer.topology.free_positions(1)
    rows, cols = layer.topology.coordinates()
    rows[0], cols[0] = free // 4, free % 4
    layer.topology.set_coordinates(rows, cols)
    layer.values.data[1] += 1e-6
    found = changes(before, after)["sparse weights"]
    n = sum(layer.topology.n_blocks for layer in layers.values())
    assert found.churn == pytest.approx(1 / n) and found.n_values == 64 * (n - 1)
    assert found.equal == pytest.approx(1 - 1 / (n - 1), abs=0.2 / n) and found.small == 1.0


def test_models_with_nothing_in_common_are_refused():
    a, b = (BertForPreTraining(BertConfig(**(SMALL | {"hidden_size": size}))) for size in (32, 64))
    with pytest.raises(RegrowError, match=r"no parameter in common|of one architecture"):
        changes(a.bert.encoder.layer[0].attention.self.query, b.bert.encoder.layer[0].output.dense)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predictions", "x.tsv"], "--predictions is for fine-tuned models"),
        (["--task", "sst2", "--pseudo-perplexity", "1"], "are for pre-trained models"),
        (["--against", "nowhere"], "nowhere holds no model"),
    ],
)
def test_flags_that_make_no_sense_are_named(run, flags, message, capsys):
    assert main(["evaluate", str(run), *flags]) == 2
    assert message in capsys.readouterr().err
