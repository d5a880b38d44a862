"""A model prepared for inference answers as before, faster, and can do nothing else."""

import json
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from regrow.bert.bench_inference import InferenceConfig, bench_inference
from regrow.bert.fused import fuse
from regrow.bert.inference import prepare
from regrow.cli import main
from regrow.errors import RegrowError
from regrow.kernels.cpu import native
from regrow.kernels.encoder import PackedEncoder
from regrow.nn import named_sparse_layers, sparsify

VOCABULARY, LONGEST = 50, 80


def config(heads: int = 2, hidden: int = 64, **changes: object) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        **changes,
    )


def sparse(block: int = 16, kind: type = BertModel, density: float = 0.3, **changes: object) -> nn.Module:
    """With biases and norms that are not what they are at first."""
    torch.manual_seed(0)
    model = kind(config(**changes)).eval()
    sparsify(model, density=density, block_size=block, include="*encoder.*", init="keep")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "encoder" in name:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("values"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(*lengths: int) -> dict[str, Tensor]:
    draw, shape = torch.Generator().manual_seed(1), (len(lengths), max(lengths))
    mask = torch.tensor([[i < length for i in range(shape[1])] for length in lengths]).long()
    return {
        "input_ids": torch.randint(1, VOCABULARY, shape, generator=draw) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, shape, generator=draw) * mask,
    }


FEW, MANY = (16,), (80, 3, 41, 80, 1, 77)
BATCHES = [(1,), FEW, (20, 7), (64,), (65,), MANY]


def answers(model: nn.Module, *lengths: int) -> Tensor:
    inputs = batch(*lengths)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    return hidden[inputs["attention_mask"].bool()]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("block", [1, 4, 8, 16, 32])
def test_answers_are_those_of_transformers(block: int) -> None:
    model = sparse(block)
    prepared = prepare(deepcopy(model))
    for lengths in BATCHES:
        torch.testing.assert_close(answers(prepared, *lengths), answers(model, *lengths), rtol=1e-4, atol=2e-5)


def test_a_head_as_wide_as_a_block_of_64_and_almost_nothing_there() -> None:
    for block, density in ((64, 0.3), (4, 0.01)):  # many block rows without a block
        model = sparse(block, density=density, hidden=128)
        prepared = prepare(deepcopy(model))
        for lengths in (FEW, MANY):
            torch.testing.assert_close(answers(prepared, *lengths), answers(model, *lengths), rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("restored_threads", "isa")
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("lengths", [FEW, (30, 31), MANY])
def test_the_number_of_threads_changes_no_bit(block: int, lengths: tuple[int, ...]) -> None:
    prepared = prepare(sparse(block))
    torch.set_num_threads(1)
    expected = answers(prepared, *lengths)
    for number in (2, 3, 7):
        torch.set_num_threads(number)
        assert torch.equal(answers(prepared, *lengths), expected)


def test_packed_for_one_instruction_set_it_stays_with_it() -> None:
    """Another one would read the packed weights in another order."""
    prepared, before = prepare(sparse(4)), native().isa()
    expected = answers(prepared, *MANY)
    for isa in native().available_isas():
        native().set_isa(isa)
        try:
            torch.testing.assert_close(answers(prepared, *MANY), expected, rtol=1e-5, atol=1e-5)
        finally:
            native().set_isa(before)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_heads_stay(kind: type) -> None:
    model, inputs = sparse(kind=kind), batch(*MANY)
    expected = model(**inputs).logits
    actual = prepare(model)(**inputs).logits
    assert not actual.requires_grad
    real = inputs["attention_mask"].bool() if kind is BertForMaskedLM else slice(None)
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=2e-5)


def test_a_fused_model_can_be_prepared_and_a_mask_of_ones_left_out() -> None:
    model, ids = fuse(sparse()), batch(16, 16)["input_ids"]
    expected = model(ids).last_hidden_state
    prepared = prepare(model)
    torch.testing.assert_close(prepared(ids).last_hidden_state, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(prepared(ids, torch.ones_like(ids)).last_hidden_state, prepared(ids).last_hidden_state)
    assert torch.equal(prepared(ids.int()).last_hidden_state, prepared(ids).last_hidden_state)
    assert prepared(ids[:0]).last_hidden_state.shape == (0, 16, 64)


def test_nothing_that_changes_later_changes_answers() -> None:
    model = sparse()
    layers = [layer for _, layer in named_sparse_layers(model)]
    prepared = prepare(model)
    expected = answers(prepared, *MANY)
    twin = deepcopy(prepared)
    twin.embeddings.requires_grad_(True)  # a gradient is asked for in vain
    for layer in layers:
        layer.values.data.zero_()
        layer.topology.col_idx.fill_(10**6)
    assert not list(named_sparse_layers(prepared)) and not any("layer" in n for n, _ in prepared.named_parameters())
    assert torch.equal(answers(prepared, *MANY), expected)
    del prepared
    assert torch.equal(answers(twin, *MANY), expected)


def test_it_can_do_nothing_else(tmp_path: Path) -> None:
    prepared, inputs = prepare(sparse()), batch(*FEW)
    assert not prepared.training and not any(p.requires_grad for p in prepared.parameters())
    for name, action in {
        "cannot train": prepared.train,
        "cannot be saved": lambda: prepared.save_pretrained(tmp_path / "model"),
        "cannot be loaded": lambda: prepared.load_state_dict({}, strict=False),
        "last hidden state alone": lambda: prepared(**inputs, output_hidden_states=True),
        "prepared already": lambda: prepare(prepared),
    }.items():
        with pytest.raises(RegrowError, match=name):
            action()
    for name, change in {
        "input_ids holds 50, outside": {"input_ids": torch.full((1, 16), VOCABULARY)},
        "input_ids holds -1, outside": {"input_ids": torch.full((1, 16), -1)},
        "token_type_ids holds 2, outside": {"token_type_ids": torch.full((1, 16), 2)},
        "81 tokens; the model has 80": {n: torch.ones(1, LONGEST + 1, dtype=torch.int64) for n in inputs},
    }.items():
        with pytest.raises(RegrowError, match=name):
            prepared(**inputs | change)
    with pytest.raises(RegrowError, match=r"float64 on cpu; expected"):
        prepared.double()(**inputs)


def refused(model: nn.Module, message: str) -> None:
    modules = list(model.modules())
    with pytest.raises(RegrowError, match=message):
        prepare(model)
    assert list(model.modules()) == modules and "forward" not in vars(model)


def test_what_cannot_be_packed_is_refused_and_left_alone() -> None:
    refused(nn.Linear(2, 2), "no BertModel")
    dense = BertModel(config())
    refused(dense, r"encoder\.layer\.0: its query is Linear; .* sparse")
    sparsify(dense, density=0.5, block_size=16, include="encoder.layer.0.*")
    refused(dense, r"encoder\.layer\.1: its query is Linear")
    refused(sparse(hidden_act="relu"), "hidden_act")
    refused(sparse(is_decoder=True), "decoder")
    refused(sparse(block=16, hidden=96, heads=12), "multiple of 16")
    refused(sparse(block=64), "64 do not divide the 32 columns of a head")
    refused(sparse().double(), "float32 on cpu")
    model = sparse()
    model.encoder.layer[1].attention.self.value.register_forward_hook(lambda *_: None)
    refused(model, r"encoder\.layer\.1: a hook on its value")
    model = sparse()
    model.encoder.layer[0].output.dense.activation = "gelu"
    refused(model, "its second has an activation")


def test_several_block_sizes() -> None:
    """From layer to layer they may differ, within one they may not."""
    torch.manual_seed(0)
    model = BertModel(config()).eval()
    sparsify(model, density=0.5, block_size=16, include="encoder.layer.0.*", init="keep")
    sparsify(model, density=0.5, block_size=4, include="encoder.layer.1.*", init="keep")
    for lengths in (FEW, MANY):
        expected = answers(model, *lengths)
        actual = answers(prepare(deepcopy(model)), *lengths)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    mixed = BertModel(config()).eval()
    sparsify(mixed, density=0.5, block_size=16, include="*.query")
    sparsify(mixed, density=0.5, block_size=8, include="encoder.*")
    refused(mixed, "values of key are blocks of 8 .* expected 16")


@pytest.mark.parametrize("array", ["row_ptr", "col_idx", "slot"])
@pytest.mark.parametrize("value", [-1, 10**6])
@pytest.mark.parametrize("name", ["attention.self.key", "attention.output.dense", "output.dense"])
def test_bad_indices_are_found_while_packing(array: str, value: int, name: str) -> None:
    model = sparse()
    model.encoder.layer[1].get_submodule(name).topology.get_buffer(array)[1] = value
    refused(model, rf"encoder\.layer\.1: {array} of")


def test_columns_out_of_order_are_found() -> None:
    model = sparse(density=1.0)
    topology = model.encoder.layer[0].output.dense.topology
    topology.col_idx[:2] = topology.col_idx[:2].flip(0)
    refused(model, "col_idx of the second feed-forward layer decreases within block row 0")


def test_bad_calls_are_refused() -> None:
    packed = prepare(sparse()).encoder.packed
    x, offsets = torch.zeros(4, 64), torch.tensor([0, 1, 4], dtype=torch.int32)
    assert packed(x, offsets).shape == x.shape and packed(x[:0], offsets[:1]).shape == (0, 64)
    for bad_x, bad_offsets, message in (
        (x[:, :32], offsets, r"expected \[N, 64\]"),
        (x[0], offsets, r"expected \[N, 64\]"),
        (x, offsets.long(), "int32"),
        (x, offsets + 1, "starts at 1"),
        (x, offsets[:2], "ends at 1"),
        (x, torch.tensor([0, 5, 4], dtype=torch.int32), "decreases at position 2"),
    ):
        with pytest.raises(RegrowError, match=message):
            packed(bad_x, bad_offsets)
    for heads, width in ((0, 64), (3, 64), (8, 64)):
        with pytest.raises(RegrowError, match="multiple of 16"):
            PackedEncoder(heads, width)


# ---- the benchmark --------------------------------------------------------------------------------

TINY = ["--size", "1/32", "--batch", "1,3", "--length", "8", "--vocab-size", "60", "--rounds", "1"]


def test_the_benchmark_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "inference.json"
    flags = ["--density", "0.5,0.2", "--blocks", "4,16", "--no-onnx", "--json", str(path)]
    assert main(["bench", "inference", *TINY, *flags]) == 0
    result = json.loads(path.read_text())
    assert [(row["batch"], row["length"]) for row in result["dense"]] == [(1, 8), (3, 8)]
    assert len(result["sparse"]) == 8
    for row in result["sparse"]:
        dense = next(d for d in result["dense"] if d["batch"] == row["batch"])
        assert row["over_pytorch"] == pytest.approx(dense["pytorch"] / row["seconds"])
        assert row["over_onnxruntime"] is None
    assert {"processor", "threads", "isa", "torch"} <= result["machine"].keys()
    assert "density 0.2, block 4" in capsys.readouterr().out


def test_onnxruntime_is_measured_where_it_is_installed() -> None:
    if not (find_spec("onnx") and find_spec("onnxruntime")):
        pytest.skip("onnxruntime needs the extra 'onnx'")
    result = bench_inference(InferenceConfig("1/32", (0.5,), (16,), (2,), (8,), vocab_size=60, rounds=1))
    assert result["sparse"][0]["over_onnxruntime"] > 0 and "onnxruntime" in result["dense"][0]


def test_without_onnxruntime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = bench_inference(InferenceConfig("1/32", (0.5,), (16,), (2,), (8,), vocab_size=60, rounds=1))
    assert "onnxruntime" not in result["dense"][0] and "regrow[onnx]" in result["notes"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"densities": (0.0,)}, "density"),
        ({"blocks": (64,)}, "block_size"),
        ({"rounds": 0}, "rounds"),
        ({"batches": ()}, "batches is empty"),
        ({"lengths": (0,)}, "length must be"),
    ],
)
def test_impossible_values_are_refused(change: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        bench_inference(InferenceConfig("1/32", onnx=False, **change))
