"""Layer options through everything that a BERT goes through: training, files, fused code, export, studies, ranks."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

from pretraining import STEPS, config
from processes import together
from regrow import RegrowError, TopologyUpdater, UpdateSchedule, count_flops, sparsify
from regrow.bert.export import export_dense
from regrow.bert.flops import bert_skeleton
from regrow.bert.fused import Fusions
from regrow.bert.inference import prepare
from regrow.bert.inspection import inspect_model
from regrow.bert.model import build_model, dense_bytes, stored_bytes
from regrow.bert.pretrain import PretrainConfig, pretrain
from regrow.bert.saved import load_saved
from regrow.bert.sizes import bert_config
from regrow.bert.soup import _different_pattern
from regrow.cli import main
from regrow.methods import create as create_method
from regrow.nn import named_sparse_layers
from regrow.nn.options import available, create
from regrow.optim import AdamW
from regrow.ranks import rank, world_size
from regrow.study.record import paper_flops
from regrow.study.spec import RunSpec, Study
from regrow.training import gradient_bytes

pytestmark = pytest.mark.usefixtures("cache")

OTHERS = [name for name in available() if name != "blocks"]
SMALL = bert_config("1/64", vocab_size=60, max_length=16)


def bert(layer: str, fuse: str = "all", **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"density": 0.25, "block_size": 8, "fusions": Fusions.named(fuse), "seed": 1} | options
    return build_model(SMALL, layer=create(layer), **settings)


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (3, 16), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(mask.bool(), labels, -100),
        "next_sentence_label": torch.tensor([0, 1, 0]),
    }


@pytest.mark.parametrize("layer", OTHERS)
def test_fused_code_computes_what_the_modules_do(layer: str) -> None:
    results = []
    for fuse in ("none", "all"):
        model = bert(layer, fuse).train()
        loss = model(**batch()).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=2e-6 + 2e-5 * largest, msg=name)


@pytest.mark.parametrize("layer", OTHERS)
def test_a_skeleton_counts_as_the_model_does(layer: str) -> None:
    sizes = {"batch_size": 2, "seq_length": 16}
    skeleton = bert_skeleton(SMALL, density=0.25, block_size=8, layer=layer)
    ours, theirs = (count_flops(model, **sizes) for model in (skeleton, bert(layer)))
    assert ours.layers == theirs.layers and ours.recomputed == theirs.recomputed
    expected = count_flops(bert_skeleton(SMALL, density=0.25, block_size=8), **sizes).not_counted
    assert ours.not_counted == theirs.not_counted == expected
    assert all(parameter.is_meta for _, part in named_sparse_layers(skeleton) for parameter in part.parameters())


@pytest.mark.parametrize("layer", OTHERS)
def test_sizes_are_compared_with_the_model_that_would_be_dense(layer: str) -> None:
    torch.manual_seed(0)
    dense = build_model(SMALL, density=None, block_size=8)
    model = bert(layer)
    assert dense_bytes(model) == stored_bytes(dense)
    report = inspect_model(model)
    assert report.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert sum(report.options.values()) == (6 if not create(layer).pairs else 2)
    assert gradient_bytes(model)[1] == gradient_bytes(dense)[1]


@pytest.mark.parametrize("layer", OTHERS)
def test_a_run_is_saved_resumed_loaded_and_inspected(
    layer: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"penalty": 0.01} if layer == "permuted" else {}
    settings = config(
        corpus, tmp_path / "whole", layer=layer, size="1/32/2", method="set", save_steps=7, keep_checkpoints=9
    )
    option, method = create(layer, **extra), create_method("set")
    whole = pretrain(settings, method, layer=option)
    assert whole.finished and whole.after["eval_mlm_loss"] < whole.before["eval_mlm_loss"]
    for step in (7, 14):  # a permutation that is learned is hard from step 12 on
        resumed = dataclasses.replace(settings, output=str(tmp_path / f"from-{step}"))
        _copy_run(Path(settings.output), Path(resumed.output), step)
        assert pretrain(resumed, method, layer=option, resume=True).finished
        states = [load_file(path / "model.safetensors") for path in (whole.path, Path(resumed.output))]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    for folder in (whole.path, whole.path / "checkpoints" / "checkpoint-7"):
        assert main(["inspect", str(folder)]) == 0
        assert f"layers are of option {layer}" in capsys.readouterr().out
        encoder = AutoModel.from_pretrained(folder)
        encoder.save_pretrained(tmp_path / folder.name)
        again = AutoModel.from_pretrained(tmp_path / folder.name)
        assert all(torch.equal(a, again.state_dict()[name]) for name, a in encoder.state_dict().items())


def _copy_run(source: Path, target: Path, step: int) -> None:
    """The run as if it had been killed after the checkpoint of ``step``."""
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    for name in ("model.safetensors", "config.json"):
        (target / name).unlink()


def test_the_command_line_has_the_options_of_a_layer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--layer", "lowrank", "--help"])
    shown = capsys.readouterr().out
    assert "options of --layer lowrank" in shown and "--rank" in shown and "options of --method dynsparse" in shown
    flags = [f"--data={corpus}", "--size=1/32/2", "--steps=4", "--n_updates=2", "--vocab_size=200", "--max_length=32"]
    flags += ["--layer=lowrank", "--rank=4", f"--output={tmp_path / 'run'}", "--batch_size=4"]
    assert main(["pretrain", *flags]) == 0
    document = json.loads((tmp_path / "run" / "config.json").read_text())["quantization_config"]
    assert document["format_version"] == 2
    entry = document["options"]["bert.encoder.layer.0.output.dense"]
    assert entry == {
        "option": "lowrank", "fields": {"rank": 4, "alpha": 16.0}, "block_size": 16, "density": 0.1
    }  # fmt: skip
    capsys.readouterr()
    assert main(["pretrain", f"--output={tmp_path / 'run'}", "--resume", "--rank=8"]) == 2
    assert "--rank 4" in capsys.readouterr().err
    assert main(["pretrain", "--layer", "odd"]) == 2
    assert "unknown layer 'odd'; choose one of blocks" in capsys.readouterr().err
    assert main(["methods", "--layers"]) == 0
    assert "\nlowrank " in capsys.readouterr().out


def test_layer_and_method_must_fit(corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus, tmp_path / "run", layer="lowrank", method="acdc")
    with pytest.raises(RegrowError, match="method 'acdc' masks dense layers"):
        pretrain(settings, create_method("acdc"))
    with pytest.raises(RegrowError, match="layer is 'wide', but the configuration says 'lowrank'"):
        pretrain(settings, create_method("set"), layer=create("wide"))
    assert not (tmp_path / "run").exists()


def test_studies_know_layers_and_runs_without_keep_their_names() -> None:
    plain = RunSpec({"method": "static", "steps": 10})
    assert plain == RunSpec({"method": "static", "steps": 10, "layer": "blocks"})
    assert not {"layer", "rank"} & plain.recipe().keys()
    spec = RunSpec({"layer": "lowrank", "rank": 16})
    assert spec == RunSpec({"layer": "lowrank"}) and spec.id != RunSpec({}).id
    assert RunSpec({"layer": "lowrank", "rank": 8}).layer.rank == 8
    assert RunSpec({"dense": True, "layer": "lowrank", "rank": 8}) == RunSpec({"dense": True})
    study = Study("ranks", defaults={"layer": "lowrank"}, experiments=[{"rank": [4, 8]}])
    assert list(study.labels().values()) == ["rank=4", "rank=8"]
    with pytest.raises(RegrowError, match="unknown option 'rank' of a run with method 'dynsparse': see"):
        RunSpec({"rank": 8})


def test_a_record_counts_the_products_of_a_layer() -> None:
    settings = PretrainConfig(size="base", layer="lowrank")
    blocks = paper_flops(dataclasses.replace(settings, layer="blocks"))["per_sequence_paper"]
    rank = create("lowrank", rank=8)
    narrow = 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    found = paper_flops(settings, rank)["per_sequence_paper"]
    assert found == pytest.approx(blocks + 3 * 2 * 128 * narrow, rel=1e-3)  # blocks come in whole numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=1), "quantization_config.options belongs to format 2"),
        (lambda c: c.update(format_version=3), "reads 1 and 2; upgrade regrow"),
        (lambda c: c.update(options=7), "options must map names to option"),
        (lambda c: c["options"].pop("bert.encoder.layer.0.output.dense"), "no linear layer of that name"),
        (lambda c: c["layers"].pop("bert.encoder.layer.0.output.dense.sparse"), "lists no blocks of"),
        (lambda c: c["options"].update(odd=c["options"]["bert.encoder.layer.0.output.dense"]), "no linear layer"),
        (lambda c: _entry(c)["fields"].update(rank=10**9), "rank 1000000000 is more than"),
        (lambda c: _entry(c)["fields"].update(rank="many"), "option 'rank' must be a whole number"),
        (lambda c: _entry(c)["fields"].update(rank=3), "down.weight must be"),
        (lambda c: _entry(c).update(density=0.0), "density must lie in"),
        (lambda c: _entry(c).update(density=float("nan")), "options must map names"),
        (lambda c: _entry(c).update(block_size=16), "but its option has 16"),
        (lambda c: _entry(c).update(option="wide", fields={}), "replaces feed-forward halves"),
    ],
)
def test_a_damaged_layout_is_refused(change: object, message: str, tmp_path: Path) -> None:
    bert("lowrank").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    change(document["quantization_config"])
    path.write_text(json.dumps(document))
    with pytest.raises(RegrowError, match=message):
        load_saved(tmp_path)


def _entry(layout: dict) -> dict:
    return layout["options"]["bert.encoder.layer.0.attention.output.dense"]


def test_a_file_without_a_part_of_an_option_is_refused(tmp_path: Path) -> None:
    bert("lowrank").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.up.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RegrowError, match=rf"lacks {name}"):
        load_saved(tmp_path)


def test_a_file_with_a_wrong_permutation_is_refused(tmp_path: Path) -> None:
    bert("permuted").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.permutation"][3] = 10**6
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RegrowError, match=r"output.dense: permutation must name each of 256 inputs exactly once"):
        load_saved(tmp_path)


def test_plain_models_are_written_as_before(tmp_path: Path) -> None:
    bert("blocks").save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert document.keys() == {"quant_method", "format_version", "layers"} and document["format_version"] == 1


def test_what_cannot_be_done_says_so(tmp_path: Path) -> None:
    with pytest.raises(RegrowError, match="prepare needs all six layers sparse"):
        prepare(bert("lowrank").eval())
    bert("parallel").save_pretrained(tmp_path / "parallel")
    with pytest.raises(RegrowError, match=r"which no nn\.Linear of 64 -> 256 can stand for"):
        export_dense(tmp_path / "parallel", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", ["lowrank", "permuted", "factorized"])
def test_what_is_one_matrix_is_exported_as_one(layer: str, tmp_path: Path) -> None:
    bert(layer).save_pretrained(tmp_path / layer)
    assert export_dense(tmp_path / layer, tmp_path / "dense").difference < 1e-4


@pytest.mark.parametrize("weights", ["dense", "blocks"])
@pytest.mark.parametrize("layer", ["lowrank", "permuted"])
def test_onnx_holds_all_parts(layer: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from regrow.bert.onnx import export_onnx

    assert export_onnx(bert(layer), tmp_path / "model.onnx", weights=weights).difference < 1e-4


def test_soups_are_made_of_one_kind_of_layer() -> None:
    models = [
        build_model(SMALL, density=0.25, block_size=8, layer=create("lowrank", rank=4, alpha=alpha))
        for alpha in (4.0, 8.0)
    ]
    assert "LowRank(rank=4, alpha=8.0), not LowRank(rank=4, alpha=4.0)" in _different_pattern(*models)


PLUGIN = '''
"""Twice: everything times two.

>>> Twice().factor
2.0
"""
from dataclasses import dataclass, field

from regrow.nn.options import Composite, LayerOption, dense_weight, register_layer


class TwiceLinear(Composite):
    """y = factor * (S x + bias)"""

    def __init__(self, place, factor):
        super().__init__(place.in_features, place.out_features)
        self.sparse, self.factor = place.of(place.in_features, place.out_features, bias=False).blocks(), factor

    def compute(self, x):
        return self.factor * self.sparse(x)

    def dense_weight(self):
        return self.factor * dense_weight(self.sparse)


@register_layer("twice")
@dataclass(frozen=True)
class Twice(LayerOption):
    """Everything times two."""

    paper = "A throw-away example"
    year = 2026
    link = "https://example.org"

    factor: float = field(default=2.0, metadata={"help": "times so much"})

    def build(self, place):
        return TwiceLinear(place, self.factor)
'''


def test_an_option_of_another_package_is_listed_gets_flags_and_is_checked(tmp_path: Path) -> None:
    (tmp_path / "twice_as_much.py").write_text(PLUGIN)
    info = tmp_path / "twice_as_much-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twice-as-much\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[regrow.layers]\ntwice = twice_as_much\n")

    def run(*argv: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert "\ntwice " in run("-m", "regrow", "methods", "--layers")
    shown = run("-m", "regrow", "pretrain", "--layer", "twice", "--help")
    assert "options of --layer twice" in shown and "--factor" in shown and "times so much" in shown
    assert run("-c", "from regrow.testing import check_layer; print(check_layer('twice').name)") == "twice\n"


# ---- two processes ------------------------------------------------------------------------------------


def train_ranks(layer: str) -> dict[str, torch.Tensor]:
    """What is trained on as many ranks as there are, in 24 steps of which a permutation is hard after 12."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    sparsify(network, density=0.25, block_size=4, layer=layer, seed=1)
    model = DistributedDataParallel(network, broadcast_buffers=False) if world_size() > 1 else network
    optimizer = AdamW(model.parameters(), lr=0.01)
    updater = TopologyUpdater(model, optimizer, "set", schedule=UpdateSchedule(STEPS, 6, 0.3), seed=2)
    draw = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        whole = torch.randn(16, 32, generator=draw)
        x = whole.chunk(world_size())[rank()]
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        updater.step()
    return network.state_dict()


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize("layer", ["lowrank", "permuted"])
def test_two_processes_train_what_one_does(layer: str, tmp_path: Path) -> None:
    first, second = together(2, f"{__file__}:train_ranks", tmp_path, layer)
    alone = train_ranks(layer)
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, alone[name], rtol=2e-3, atol=2e-3, msg=name)
