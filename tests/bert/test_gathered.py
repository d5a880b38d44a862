"""BERT of gathered blocks: fused or not, inspected, exported; and what is for square blocks alone says so."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from regrow.bert.changes import changes
from regrow.bert.fused import Fusions
from regrow.bert.inference import prepare
from regrow.bert.inspection import inspect_model
from regrow.bert.model import BertForPreTraining, build_model
from regrow.bert.pattern_plot import pattern
from regrow.cli import main
from regrow.errors import RegrowError
from regrow.nn import GatheredLinear, named_sparse_layers, sparsify

CONFIG = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def model(fusions: str, seed: int = 0) -> BertForPreTraining:
    torch.manual_seed(0)
    bert = build_model(
        BertConfig(**CONFIG), density=0.3, block_size=16, layer="gathered", fusions=Fusions.named(fusions), seed=seed
    )
    return bert.train()


def test_every_fusion_has_the_loss_and_gradients_of_none() -> None:
    ids = torch.randint(1, 60, (5, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.tensor([0, 1, 1, 0, 1])}

    def results(fusions: str) -> list[torch.Tensor]:
        bert = model(fusions)
        loss = bert(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad for _, layer in named_sparse_layers(bert) for p in layer.parameters())]

    expected = results("none")
    assert len(expected) == 1 + 2 * 6 * 2
    for ours, theirs in zip(results("all"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    bert = sparsify(
        BertModel(BertConfig(**CONFIG)).eval(), density=0.3, block_size=16, layer="gathered", include="enc*"
    )
    bert.save_pretrained(tmp_path)
    again = BertModel.from_pretrained(tmp_path)
    assert {type(layer) for _, layer in named_sparse_layers(again)} == {GatheredLinear}
    ids = torch.arange(1, 21).view(2, 10)
    assert torch.equal(again(ids).last_hidden_state, bert(ids).last_hidden_state)


def test_prepare_is_for_square_blocks() -> None:
    bert = sparsify(
        BertModel(BertConfig(**CONFIG)).eval(), density=0.3, block_size=16, layer="gathered", include="enc*"
    )
    with pytest.raises(
        RegrowError, match=r"encoder.layer.0: its query has gathered blocks of 16x1; prepare is for square"
    ):
        prepare(bert)


def test_reports_name_the_block() -> None:
    layer = GatheredLinear(32, 32, density=0.25)
    layer.topology.set_coordinates(torch.tensor([0] * 8 + [1] * 8), torch.arange(8).repeat(2))
    layer.values.data.fill_(-2.0)
    [report] = inspect_model(nn.Sequential(layer)).layers
    assert (report.block_size, report.n_blocks, report.dead_outputs, report.dead_inputs) == ("16x1", 16, 0, 24)
    rms = pattern(layer)
    assert rms.shape == (2, 32) and rms[:, :8].eq(2.0).all() and rms[:, 8:].isnan().all()
    whole = pattern(layer, edge=2)
    assert torch.allclose(whole[:, :1], torch.tensor(2.0 / 2**0.5, dtype=torch.float64))


def test_two_models_are_compared_by_their_units() -> None:
    one, other = model("none"), model("none")
    for _, layer in named_sparse_layers(other):
        layer.values.data += 1
    assert changes(one, other)["sparse weights"] != changes(one, one)["sparse weights"]


def test_the_benchmark_measures_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--shapes", "48x64", "--blocks", "16,16x1", "--densities", "0.5", "--tokens", "8", "--rounds", "1"]
    assert main(["bench", "kernels", *flags, "--json", str(tmp_path / "rows.json")]) == 0
    assert "16x1" in capsys.readouterr().out
    assert '"block_size": "16x1"' in (tmp_path / "rows.json").read_text()
