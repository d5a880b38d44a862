"""FLOPs of BERT: the paper's totals, and torch's own count of what runs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from regrow import FlopsReport, RegrowError, count_flops
from regrow.bert.flops import bert_skeleton
from regrow.bert.fused import Fusions
from regrow.bert.model import build_model
from regrow.bert.sizes import bert_config
from regrow.cli import main

BATCH, LENGTH, PREDICTED, VOCABULARY = 3, 24, 4, 90
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def count(model: nn.Module, **options: Any) -> FlopsReport:
    return count_flops(model, batch_size=BATCH, seq_length=LENGTH, **options)


def model(density: float | None = None, fusions: str = "none") -> nn.Module:
    torch.manual_seed(0)
    built = build_model(BertConfig(**CONFIG), density=density, block_size=8, fusions=Fusions.named(fusions)).train()
    built.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    return built


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, 3 : 3 + PREDICTED] = 1
    return {"input_ids": ids, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 0])}


def step(network: nn.Module, **inputs: Tensor) -> None:
    output = network(**inputs)
    loss = output.loss if "loss" in output else sum(x.sum() for x in output.values())
    if loss.requires_grad:
        loss.backward()


# ---- the paper's convention -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "density", "published"),
    [("small", None, 10.07e9), ("mini", None, 2.617e9), ("medium", 0.1, 2.738e9), ("base", 0.1, 8.33e9)],
)
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_papers_totals(size: str, density: float | None, published: float, block_size: int) -> None:
    config = bert_config(size, vocab_size=30522, max_length=128)
    network = bert_skeleton(config, density=density, block_size=block_size)
    report = count_flops(network, batch_size=8, seq_length=128, convention="paper")
    assert report.per_sequence == pytest.approx(published, rel=0.01)
    weights = 12 * config.num_hidden_layers * config.hidden_size**2 * report.density("encoder layers")
    formula = 3 * (2 * 128 * weights + 4 * config.num_hidden_layers * 128**2 * config.hidden_size)
    assert report.per_sequence == pytest.approx(formula, rel=1e-12)
    assert list(report.parts) == ["encoder layers", "attention products"]


def test_the_paper_counts_all_gradients_whatever_is_frozen() -> None:
    network = model()
    before = count(network, convention="paper").products
    network.requires_grad_(False)
    assert count(network, convention="paper").products == before
    assert before.input_gradient + before.weight_gradient == 2 * before.forward


def test_a_skeleton_counts_as_the_model_does() -> None:
    for distribution in ("uniform", "erk"):
        options: dict = {"density": 0.3, "block_size": 8, "distribution": distribution}
        config = BertConfig(**CONFIG)
        skeleton, real = bert_skeleton(config, **options), build_model(config, **options)
        assert count(skeleton, optimizer=True) == count(real, optimizer=True)
    with pytest.raises(RegrowError, match="does not divide"):
        bert_skeleton(BertConfig(**CONFIG), density=0.3, block_size=64)


# ---- torch's count --------------------------------------------------------------------------------


def torchs_count(network: nn.Module, inputs: dict[str, Tensor], mapping: dict | None = None) -> tuple[int, int]:
    """Forward, and all."""
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step(network, **inputs)
    both = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        network(**inputs)
    return counter.get_total_flops(), both


@pytest.mark.parametrize(
    "trained",
    [
        "*",
        "bert.encoder",
        "bert.encoder.layer.1",
        "bert.encoder.layer.0.output",
        "bert.pooler,cls",
        "cls.predictions",
        "cls.predictions.bias",
        "cls.seq_relationship",
        "nothing",
    ],
)
def test_ours_is_what_torch_counts(trained: str) -> None:
    network = model()
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name != "cls.predictions.decoder.weight":  # the embedding's
            parameter.requires_grad_(trained == "*" or name.startswith(tuple(trained.split(","))))
    report = count(network, predicted=PREDICTED)
    assert (report.products.forward, report.products.total) == torchs_count(network, batch())
    assert report.recomputed == 0 and not report.not_counted


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertLMHeadModel",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
    ],
)
def test_transformers_models_are_what_torch_counts(name: str) -> None:
    network = getattr(transformers, name)(BertConfig(**CONFIG, attn_implementation="eager")).train()
    ids = batch()["input_ids"]
    if name == "BertForMultipleChoice":
        ids = ids[None]
    report = count(network, predicted="all")
    assert (report.products.forward, report.products.total) == torchs_count(network, {"input_ids": ids})
    assert not report.not_counted


def test_a_model_inside_a_model() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = transformers.BertModel(BertConfig(**CONFIG, attn_implementation="eager"), False)
            self.head = nn.Linear(32, 3)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"y": self.head(self.body(input_ids).last_hidden_state[:, 0])}

    network = Tagger()
    report = count(network, rows={"head": 1})
    expected = torchs_count(network, {"input_ids": batch()["input_ids"]})
    assert (report.products.forward, report.products.total) == expected


def test_a_layer_may_be_several() -> None:
    network = model()
    query = network.bert.encoder.layer[0].attention.self.query
    network.bert.encoder.layer[0].attention.self.query = nn.Sequential(query, nn.Linear(32, 32))
    report = count(network, predicted=PREDICTED)
    assert (report.products.forward, report.products.total) == torchs_count(network, batch())
    assert "layers" not in report.parts


def product(x: Any, values: Any, *others: Any, **named: Any) -> int:
    return 2 * x[0] * values[0] * values[1] ** 2


def sampled(g: Any, x: Any, row_ptr: Any, col_idx: Any, slot: Any, b: int, *others: Any, **named: Any) -> int:
    return 2 * x[0] * slot[0] * b**2


def ffn(*args: Any, **named: Any) -> int:
    return product(args[0], args[1]) + product(args[0], args[6])


def ffn_backward(*args: Any, **named: Any) -> int:
    return 3 * product(args[1], args[2]) + 2 * product(args[1], args[7])  # hidden activations again


def scores(qkv: Any, offsets: Any) -> int:
    sequences = offsets[0] - 1
    return 2 * sequences * (qkv[0] // sequences) ** 2 * qkv[1] // 3


def attention(*args: Any, **named: Any) -> int:
    return 2 * scores(args[0], args[1])


def attention_backward(*args: Any, **named: Any) -> int:
    return 5 * scores(args[1], args[4])  # scores again


def torchs_attention(query: Any, *others: Any, **named: Any) -> int:
    batch, heads, length, width = query
    return 4 * batch * heads * length**2 * width


def torchs_attention_backward(g: Any, query: Any, *others: Any, **named: Any) -> int:
    return 2 * torchs_attention(query)


regrow, aten = torch.ops.regrow, torch.ops.aten
FORMULAS = {
    regrow.spmm: product,
    regrow.spmm_t: product,
    regrow.sddmm: sampled,
    regrow.ffn: ffn,
    regrow.ffn_backward: ffn_backward,
    regrow.attention: attention,
    regrow.attention_backward: attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: torchs_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: torchs_attention_backward,
}


@pytest.mark.parametrize("fusions", ["none", "qkv,norm,unpad", "loss", "ffn", "attention", "all"])
@pytest.mark.parametrize("density", [0.5, None], ids=["sparse", "dense"])
def test_what_is_computed_again_is_told_apart(fusions: str, density: float | None) -> None:
    network = model(density, fusions)
    report = count(network, predicted=PREDICTED)
    ran = torchs_count(network, batch(), FORMULAS)[1]
    assert ran == report.products.total + report.recomputed
    again = "attention" in fusions or fusions == "all" or (fusions == "ffn" and density is not None)
    assert bool(report.recomputed) == again
    assert report.products == count(model(density), predicted=PREDICTED).products


@pytest.mark.parametrize("fusions", ["none", "all"])
def test_gradient_checkpointing_computes_the_layers_again(fusions: str) -> None:
    network = model(0.5, fusions)
    for layer in network.bert.encoder.layer:  # as gradient_checkpointing_enable does
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    report = count(network, predicted=PREDICTED)
    ran = torchs_count(network, batch(), FORMULAS)[1]
    assert ran == report.products.total + report.recomputed
    assert "computed again, not counted" in str(report)


# ---- options and the command ----------------------------------------------------------------------


def test_the_vocabulary_head_is_at_the_predicted_positions() -> None:
    def rows(**options: Any) -> set[int]:
        return {x.rows for x in count(model(), **options).layers if x.part in ("vocabulary head", "head transform")}

    assert rows() == {BATCH * 4}  # 15 % of 24
    assert rows(predicted=7) == {BATCH * 7} and rows(predicted="all") == {BATCH * LENGTH}
    assert rows(rows={"cls.predictions.*": 2}) == {BATCH * 2}


def test_cross_attention_is_refused() -> None:
    config = BertConfig(**CONFIG, is_decoder=True, add_cross_attention=True)
    with pytest.raises(RegrowError, match=r"crossattention.self: cross-attention depends on a second sequence"):
        count(transformers.BertLMHeadModel(config))


def test_the_command_prints_the_table_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "flops.json"
    argv = ["flops", "--size", "base", "--density", "0.1", "--block-size", "16", "--convention", "paper"]
    assert main([*argv, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1 x 128 tokens, convention paper" in shown and "encoder layers, density 0.09997" in shown
    assert json.loads(path.read_text())["per_sequence"] == pytest.approx(8.33e9, rel=0.01)
    argv = ["flops", "--size", "tiny", "--density", "0.1", "--method", "rigl", "--n-updates", "160", "--steps", "1000"]
    assert main(argv) == 0
    assert "159 updates in 1000 steps" in capsys.readouterr().out
    assert main(["flops", "--size", "tiny", "--density", "2"]) == 2
    assert "density must lie in (0, 1]" in capsys.readouterr().err
