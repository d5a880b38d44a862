"""Weight transforms in pre-training and fine-tuning: bitwise resume, and a saved model that any program loads."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, TrainerCallback

import finetuning
from finetuning import write_encoder, write_table
from pretraining import STEPS, config, metrics_without_clock
from processes import together
from regrow.bert.finetune import FinetuneResult, finetune
from regrow.bert.pretrain import PretrainResult, pretrain
from regrow.bert.saved import load_saved
from regrow.cli import main
from regrow.errors import RegrowError
from regrow.methods import create

pytestmark = pytest.mark.usefixtures("cache")

NAMES = ["maskllm", "masksparsity", "pdp", "pgf", "srste", "sste"]
EVERY_STEP = {"dropout": 0.0, "logging_steps": 1}
OF_TWO_IN_FOUR = {"maskllm", "pgf", "srste", "sste"}
RTE = Path(__file__).parents[2] / "../shared/data/glue/RTE"


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def encoder_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2}


def check_kept(name: str, model: torch.nn.Module, density: float) -> None:
    for key, weight in encoder_weights(model).items():
        if name == "sste" and ".attention." in key:
            assert bool((weight != 0).all())
        elif name in OF_TWO_IN_FOUR:
            assert ((weight != 0).view(-1, 4).sum(1) == 2).all(), key
        else:
            share = (weight != 0).float().mean().item()
            assert share == pytest.approx(density, abs=0.01 if name == "pdp" else 0.04), key


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_resumes_bitwise_and_saves_the_sparse_weights(name: str, corpus: Path, tmp_path: Path) -> None:
    def trained(folder: str, resume: bool = False, stop: int | None = None) -> PretrainResult:
        callbacks = [] if stop is None else [Interrupt(stop)]
        return pretrain(config(corpus, tmp_path / folder), create(name), resume=resume, callbacks=callbacks)

    whole = trained("whole")
    assert whole.after["eval_mlm_loss"] < whole.before["eval_mlm_loss"]
    assert not trained("cut", stop=12).finished
    torch.manual_seed(123)  # whatever the new process has drawn
    resumed = trained("cut", resume=True)
    for file in ("model.safetensors", f"checkpoints/checkpoint-{STEPS}/model.safetensors"):
        ours, theirs = (load_file(run.path / file) for run in (resumed, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics_without_clock(resumed.path) == metrics_without_clock(whole.path)
    model = AutoModel.from_pretrained(whole.path)
    check_kept(name, model, 0.2)
    assert whole.density == pytest.approx(0.5 if name in OF_TWO_IN_FOUR else 0.2, abs=0.04)
    assert whole.coverage is None and whole.stored_bytes == whole.dense_bytes
    assert not hasattr(model.config, "regrow_transform")


def test_what_was_evaluated_last_is_what_is_saved(corpus: Path, tmp_path: Path) -> None:
    result = pretrain(config(corpus, tmp_path / "run", method="pdp"), create("pdp"))
    assert main(["evaluate", str(result.path), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mlm_loss"] == pytest.approx(result.after["eval_mlm_loss"], rel=1e-5)


def test_a_checkpoint_under_way_holds_everything_and_says_so(corpus: Path, tmp_path: Path) -> None:
    run = pretrain(config(corpus, tmp_path / "run"), create("maskllm"), callbacks=[Interrupt(12)])
    assert not run.finished
    (checkpoint,) = (run.path / "checkpoints").iterdir()
    saved = load_file(checkpoint / "model.safetensors")
    query = "bert.encoder.layer.0.attention.self.query"
    assert saved[f"{query}.logits"].shape == (saved[f"{query}.weight"].numel() // 4, 6)
    with pytest.warns(UserWarning, match="is a checkpoint of a training with maskllm: taken are its dense weights"):
        model = load_saved(run.path)
    assert all(bool((weight != 0).all()) for weight in encoder_weights(model).values())
    assert not hasattr(model.config, "regrow_transform")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "dense", density=None)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tasks") / "reviews")


def tuned(model: Path, data: Path, output: Path, name: str, resume: bool = False, callbacks=(), **changes):
    if name not in OF_TWO_IN_FOUR:
        changes = {"density": 0.25, "block_size": 8} | changes
    settings = finetuning.config(model, data, output, sparsify=name, **changes)
    return finetune(settings, create(name), resume=resume, callbacks=callbacks)


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuning_resumes_bitwise_and_saves_the_sparse_weights(
    name: str, encoder: Path, reviews: Path, tmp_path: Path
) -> None:
    whole: FinetuneResult = tuned(encoder, reviews, tmp_path / "whole", name)
    stopped = tuned(encoder, reviews, tmp_path / "cut", name, callbacks=[Interrupt(17)])
    assert not stopped.finished and stopped.step == 18
    assert tuned(encoder, reviews, tmp_path / "cut", name, resume=True).finished
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics_without_clock(tmp_path / "whole") == metrics_without_clock(tmp_path / "cut")
    check_kept(name, AutoModelForSequenceClassification.from_pretrained(whole.path), 0.25)
    assert whole.density == pytest.approx(0.5 if name in OF_TWO_IN_FOUR else 0.25)


def test_srste_learns_the_task(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    assert tuned(encoder, reviews, tmp_path / "run", "srste", epochs=3).metrics["accuracy"] > 0.95


def test_maskllm_leaves_the_encoder_frozen_and_trains_the_head(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    result = tuned(encoder, reviews, tmp_path / "run", "maskllm")
    before = dict(load_saved(encoder).bert.named_parameters())
    after = dict(AutoModelForSequenceClassification.from_pretrained(result.path).bert.named_parameters())
    moved = set()
    for name, parameter in after.items():
        kept = parameter != 0 if ".layer." in name and parameter.dim() == 2 else torch.ones_like(parameter).bool()
        if not torch.equal(parameter[kept], before[name][kept]):
            moved.add(name)
    assert moved == {"pooler.dense.weight", "pooler.dense.bias"}
    from regrow.methods.nm import nm_mask

    query = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(after[query] != 0, nm_mask(before[query], 2, 4))  # and masks are learned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.5}, "sparsify='srste' keeps 2 of every 4 weights; drop --density"),
        ({"topology": "dynamic"}, "sparsify='srste' is for dense weights; drop --topology dynamic"),
        ({"sparsify": "set"}, "sparsify must be oneshot, gradual or one of maskllm, masksparsity, pdp"),
        ({"sparsify": "pgf"}, "sparsify='pgf' needs that method, not 'srste'"),
        ({"sparsify": "oneshot", "topology": "dynamic", "method": "srste"}, "method 'srste' trains dense weights"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    changes: dict, message: str, encoder: Path, reviews: Path, tmp_path: Path
) -> None:
    settings = finetuning.config(encoder, reviews, tmp_path / "run", **{"sparsify": "srste", **changes})
    with pytest.raises(RegrowError, match=message):
        finetune(settings, create("srste"))
    assert not (tmp_path / "run").exists()


def test_a_sparse_model_or_no_density_is_refused(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    sparse = write_encoder(tmp_path / "sparse")
    with pytest.raises(RegrowError, match="is sparse already; --sparsify srste is for dense models"):
        tuned(sparse, reviews, tmp_path / "run", "srste")
    with pytest.raises(RegrowError, match="method 'pdp' needs a density"):
        tuned(encoder, reviews, tmp_path / "run", "pdp", density=None)
    assert not (tmp_path / "run").exists()


def test_command_line_takes_the_methods_options(
    encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--sparsify", "maskllm", "--help"])
    assert "options of --sparsify maskllm" in capsys.readouterr().out
    flags = ["--task", "classification", "--text_columns", "review", "--label_column", "verdict", "--epochs", "0.25"]
    run = ["--model", str(encoder), "--data", str(reviews), "--output", str(tmp_path / "run")]
    assert main(["finetune", *run, *flags, "--sparsify", "srste", "--n", "1"]) == 0
    assert "encoder density    0.25" in capsys.readouterr().out
    assert main(["finetune", "--output", str(tmp_path / "run"), "--resume", "--sparsify", "srste", "--n", "2"]) == 2
    assert "drop --n 2" in capsys.readouterr().err


@pytest.mark.skipif(not RTE.is_dir(), reason=f"{RTE} is not there")
def test_a_real_task(encoder: Path, tmp_path: Path) -> None:
    options = {"task": "rte", "text_columns": "", "label_column": None, "max_length": 32, "epochs": 0.02}
    result = tuned(encoder, RTE, tmp_path / "run", "maskllm", **options)
    assert result.finished and result.density == 0.5 and 0 < result.metrics["accuracy"] < 1


TWO = ("maskllm", "masksparsity", "srste")


def train_two(corpus: Path, folder: Path) -> dict[str, PretrainResult | str]:
    """On each rank: the results of a few methods, and the message of parameters that cannot be shared out."""
    with pytest.raises(RegrowError) as refusal:
        pretrain(config(corpus, folder / "refused", parallel="fsdp"), create("srste"))
    found = {name: pretrain(config(corpus, folder / name, **EVERY_STEP), create(name)) for name in TWO}
    return {"refusal": str(refusal.value), **found}


def test_two_processes_train_what_one_does(corpus: Path, tmp_path: Path) -> None:
    first, second = together(2, f"{__file__}:train_two", tmp_path / "ranks", corpus, tmp_path / "two")
    assert first == second
    assert "method 'srste' transforms dense weights, which parameters that are shared out cannot" in first["refusal"]
    for name in TWO:
        alone = pretrain(config(corpus, tmp_path / name, **EVERY_STEP), create(name))
        lines, expected = (metrics_without_clock(result.path) for result in (first[name], alone))
        assert len(lines) == len(expected) > STEPS
        for line, other in zip(lines, expected, strict=True):
            losses = [key for key in line if key.endswith("loss")]
            assert [line[key] for key in losses] == pytest.approx([other[key] for key in losses], abs=1e-4, rel=0)
