"""What is exported computes what the model computes, and what cannot be is refused by name."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, PreTrainedModel

from regrow import RegrowError, sparsify
from regrow.bert.export import HEADS, compare, export_dense, plain_copy, random_batches
from regrow.bert.fused import Fusions, fuse
from regrow.bert.model import build_model, dense_bytes, stored_bytes
from regrow.bert.output import new_output
from regrow.bert.saved import load_saved
from regrow.bert.soup import greedy_soup, save_soup, soup
from regrow.bert.tokenizer import train_wordpiece
from regrow.cli import main
from regrow.nn import named_sparse_layers
from regrow.nn.gathered import sparse_linear

DIFFERENCE = 1e-5


def config(**changes: object) -> BertConfig:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    return BertConfig(**(sizes | changes))


def sparse(kind: type = transformers.BertForMaskedLM, seed: int = 0, block_size: int = 16) -> PreTrainedModel:
    """A model whose biases are not zero, so that one that gets lost is noticed."""
    torch.manual_seed(seed)
    model = sparsify(kind(config()), density=0.2, block_size=block_size, include="*encoder*", seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def other_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same patterns with other numbers."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return other


def save(model: PreTrainedModel, folder: Path, words: str = "one two three") -> Path:
    model.save_pretrained(folder)
    train_wordpiece([words] * 3, 60).save_pretrained(folder)
    return folder


# Dense directories


def test_a_dense_export_gives_the_same_in_a_process_without_regrow(tmp_path: Path) -> None:
    model = sparse()
    batch = random_batches(model.config)[-1]
    with torch.no_grad():
        expected = model(**batch).logits
    exported = export_dense(save(model, tmp_path / "sparse"), tmp_path / "dense")
    assert exported.difference <= DIFFERENCE and exported.n_bytes > 0
    save_file(batch, tmp_path / "batch.safetensors")
    program = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        "model = AutoModelForMaskedLM.from_pretrained(sys.argv[1] + '/dense').eval()\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1] + '/dense').tokenize('two three')\n"
        "with torch.no_grad(): logits = model(**load_file(sys.argv[1] + '/batch.safetensors')).logits\n"
        "assert 'regrow' not in sys.modules\n"
        "save_file({'logits': logits}, sys.argv[1] + '/logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    assert (logits - expected).abs().max() <= DIFFERENCE * expected.abs().max()


def test_an_existing_output_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(sparse(), tmp_path / "sparse")
    (tmp_path / "out").write_text("mine")
    for command in (
        ["dense", f"{tmp_path}/sparse", f"{tmp_path}/out"],
        ["soup", f"{tmp_path}/out", f"{tmp_path}/sparse"],
    ):
        assert main(["export", *command]) == 2
        assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with new_output(tmp_path / "out") as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RegrowError, match="holds no model"):
        export_dense(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Copies and comparison


def test_a_fused_pretraining_model_is_copied_as_transformers_own() -> None:
    model = build_model(config(hidden_dropout_prob=0.0), density=0.2, block_size=16)
    plain = plain_copy(model)
    assert type(plain) is transformers.BertForPreTraining
    assert type(plain.bert.encoder.layer[0]).__name__ == "BertLayer" and not hasattr(plain.bert, "fusions")
    assert model.bert.fusions == Fusions() and "forward" in vars(model.bert)  # the model itself is what it was
    for batch in random_batches(model.config):
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            fused, ours = (m.bert(**batch).last_hidden_state[real] for m in (model.eval(), plain))
        assert (fused - ours).abs().max() <= DIFFERENCE * ours.abs().max()


def test_batches_have_padding_and_compare_sees_a_wrong_number() -> None:
    model = sparse()
    batches = random_batches(model.config)
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(1, 1), (1, 32), (2, 7), (5, 32)}
    assert compare(model, lambda batch: model(**batch), batches) == 0.0
    for wrong in (1.0, float("nan")):
        with pytest.raises(RegrowError, match="logits of the export differs"):
            compare(model, lambda batch, wrong=wrong: {"logits": model(**batch).logits + wrong}, batches)
    with pytest.raises(RegrowError, match="outputs"):
        compare(model, lambda batch: {"other": model(**batch).logits}, batches)


def test_classes_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(RegrowError, match="cannot export a BertForMultipleChoice"):
        plain_copy(transformers.BertForMultipleChoice(config()))
    with pytest.raises(RegrowError, match="decoder"):
        plain_copy(transformers.BertModel(config(is_decoder=True)))


# ONNX


@pytest.fixture
def onnx_modules() -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (regrow[onnx])")


@pytest.mark.usefixtures("onnx_modules")
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_onnxruntime_computes_what_every_head_computes(kind: type, tmp_path: Path) -> None:
    from regrow.bert.onnx import INPUTS, export_onnx

    model = sparse(kind)
    exported = export_onnx(fuse(model), tmp_path / "model.onnx", weights="blocks")
    assert exported.difference <= DIFFERENCE  # on four shapes, with padding

    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(INPUTS)
    assert all(i.shape == ["batch", "length"] for i in session.get_inputs())
    batch = {name: torch.ones(3, 11, dtype=torch.long) for name in INPUTS}  # a shape not seen before
    got = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    with torch.no_grad():
        expected = dict(plain_copy(model)(**batch))
    assert [o.name for o in session.get_outputs()] == list(expected)
    for ours, theirs in zip(expected.values(), got, strict=True):
        assert abs(ours.numpy() - theirs).max() <= DIFFERENCE * ours.abs().max()


@pytest.mark.usefixtures("onnx_modules")
def test_blocks_make_a_small_file_and_both_kinds_agree(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = sparsify(
        transformers.BertModel(config(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)).eval(),
        density=0.1,
        block_size=16,
        include="encoder*",
    )
    save(model, tmp_path / "sparse")
    for weights in ("dense", "blocks"):
        path = str(tmp_path / f"{weights}.onnx")
        assert main(["export", "onnx", str(tmp_path / "sparse"), path, "--weights", weights]) == 0
        assert "differ by at most" in capsys.readouterr().out
    dense, blocks = ((tmp_path / f"{weights}.onnx").stat().st_size for weights in ("dense", "blocks"))
    assert dense == pytest.approx(dense_bytes(model), rel=0.05)
    assert blocks == pytest.approx(stored_bytes(model), rel=0.1)
    for path in tmp_path.glob("*.onnx"):  # the exporter would write where it is installed
        assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.usefixtures("onnx_modules")
@pytest.mark.parametrize("block", [1, 4, 64, (16, 1)])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)], ids=str)
def test_a_layers_operators_compute_the_layer(block: int | tuple[int, int], shape: tuple[int, ...]) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    from regrow.bert.onnx_blocks import block_product

    layer = sparse_linear(64, 128, block=block, density=0.02, bias=False)
    if block in (1, 4):
        assert int(layer.topology.row_ptr.diff().min()) == 0  # rows without blocks are part of the test
    part = block_product(onnx, layer, "layer", "x", "y")
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = onnx.helper.make_graph(part.nodes, "layer", ports[:1], ports[1:], part.constants)
    document = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    x = torch.randn(shape)
    [y] = ReferenceEvaluator(document).run(None, {"x": x.numpy()})
    assert y.shape == (*shape[:-1], 128)
    assert abs(y - layer(x).detach().numpy()).max() <= DIFFERENCE * 10


@pytest.mark.usefixtures("onnx_modules")
@pytest.mark.parametrize("opset", [18, 23])
def test_the_oldest_and_the_newest_operators(opset: int, tmp_path: Path) -> None:
    import onnx

    from regrow.bert.onnx import export_onnx

    exported = export_onnx(sparse(), tmp_path / "model.onnx", weights="blocks", opset=opset)
    assert exported.difference <= DIFFERENCE
    assert [(o.domain, o.version) for o in onnx.load(exported.path).opset_import] == [("", opset)]


@pytest.mark.usefixtures("onnx_modules")
def test_onnx_mistakes_are_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    from regrow.bert.onnx import export_onnx

    path = tmp_path / "model.onnx"
    for options, message in (
        ({"opset": 9}, "opset must lie between 18 and 23, got 9"),
        ({"weights": "some"}, "weights must be"),
        ({"weights": "blocks"}, "has no sparse layer"),
    ):
        with pytest.raises(RegrowError, match=message):
            export_onnx(transformers.BertModel(config()), path, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.bert.onnx import export_onnx

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RegrowError, match=r"needs onnx\w*: pip install \"regrow\[onnx\]\""):
        export_onnx(sparse(), tmp_path / "model.onnx")


@pytest.mark.usefixtures("onnx_modules")
def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.bert import onnx, onnx_blocks

    monkeypatch.setattr(onnx_blocks, "row_order", lambda layer: torch.arange(layer.topology.n_block_rows).flip(0))
    with pytest.raises(RegrowError, match="it was not kept"):
        onnx.export_onnx(sparse(), tmp_path / "model.onnx", weights="blocks")
    assert not list(tmp_path.iterdir())


# Soups


def shuffled(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with the blocks in slots of another order."""
    model = copy.deepcopy(model)
    for _, layer in named_sparse_layers(model):
        rows, cols = layer.topology.coordinates()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
        layer.values.data = layer.values.data[order].clone()
        layer.topology.set_coordinates(rows[order], cols[order])
    return model


def dense_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    weights = {f"{name}.weight": layer.to_dense() for name, layer in named_sparse_layers(model)}
    rest = {name: p.detach() for name, p in model.named_parameters() if not name.endswith(".values")}
    return weights | rest


def test_a_soup_averages_by_position_whatever_the_slots() -> None:
    one = sparse()
    two, three = shuffled(other_weights(one, 1)), other_weights(one, 2)
    before = [copy.deepcopy(m.state_dict()) for m in (one, two, three)]
    average = dense_state(soup([one, two, three]))
    parts = [dense_state(m) for m in (one, two, three)]
    assert average.keys() == parts[0].keys()
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, torch.stack([part[name] for part in parts]).mean(0))
    for model, state in zip((one, two, three), before, strict=True):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_saved_soup_loads_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = sparse()
    two = shuffled(other_weights(one, 1))
    folders = [str(save(model, tmp_path / name)) for model, name in ((one, "one"), (two, "two"))]
    assert main(["export", "soup", f"{tmp_path}/soup", *folders]) == 0
    assert "average of 2 models" in capsys.readouterr().out
    loaded, expected = dense_state(load_saved(tmp_path / "soup")), dense_state(soup([one, two]))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert len(list(named_sparse_layers(load_saved(tmp_path / "soup")))) == 6
    assert (tmp_path / "soup" / "tokenizer.json").is_file()


def test_models_that_do_not_belong_together_are_refused_by_name(tmp_path: Path) -> None:
    one = sparse()
    moved = copy.deepcopy(one)
    name, layer = next(named_sparse_layers(moved))
    rows, cols = layer.topology.coordinates()
    free = int(layer.topology.free_positions(1))
    rows[0], cols[0] = free // layer.topology.n_block_cols, free % layer.topology.n_block_cols
    layer.topology.set_coordinates(rows, cols)
    labelled = [sparse(transformers.BertForSequenceClassification) for _ in range(2)]
    labelled[1].config.id2label = {0: "no", 1: "yes"}
    heads = sparse()
    heads.config.num_attention_heads = 4
    buffered = copy.deepcopy(one)
    buffered.bert.embeddings.position_ids[0, 0] = 7
    for models, message in (
        ((one, moved), f"patterns differ: 2 positions of {name}"),
        ((one, sparse(block_size=4)), "4x4 blocks"),
        ((one, transformers.BertForMaskedLM(config())), "sparse in one of them only"),
        ((one, sparse(transformers.BertForQuestionAnswering)), "it is a BertForQuestionAnswering"),
        ((one, transformers.BertForMaskedLM(config(vocab_size=61))), "vocab_size is 61, not 60"),
        (labelled, "id2label"),
        ((one, heads), "num_attention_heads is 4, not 2"),
        ((one, buffered), "position_ids holds other numbers"),
        ((), "at least one model"),
    ):
        with pytest.raises(RegrowError, match=message):
            soup(models)
    folders = [save(one, tmp_path / "a"), save(one, tmp_path / "b", "four five six")]
    with pytest.raises(RegrowError, match=r"b has another vocabulary than .*a;"):
        save_soup(folders, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_greedy_soup_keeps_what_does_no_harm() -> None:
    """Scores are the closeness of one bias to 0: of 3, 1, -1 and 9, best first, the average of 1 and -1 is best."""
    one = sparse()
    models = []
    for value in (3.0, 1.0, -1.0, 9.0):
        model = copy.deepcopy(one)
        nn.init.constant_(model.cls.predictions.bias, value)
        models.append(model)

    def score(model: PreTrainedModel) -> float:
        return -abs(float(model.cls.predictions.bias.detach().mean()))

    best, chosen = greedy_soup(models, score)
    assert chosen == [1, 2]
    assert score(best) == 0.0
    assert greedy_soup(models[:2], score)[1] == [1]  # the other would make it worse
    with pytest.raises(RegrowError, match="score of model 1 is not a number"):
        greedy_soup(models, lambda model: float("nan"))
