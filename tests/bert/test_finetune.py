"""Fine-tuning end to end, on tasks that a small encoder can learn from nothing."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetuning import config, write_encoder, write_questions, write_table
from pretraining import metrics_without_clock
from regrow import RegrowError
from regrow.bert.finetune import FinetuneResult, finetune
from regrow.bert.saved import load_saved
from regrow.cli import main
from regrow.methods import create
from regrow.nn import BlockSparseLinear, named_sparse_layers


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "sparse")


@pytest.fixture(scope="module")
def dense_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "dense", density=None)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tasks") / "reviews")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("tasks") / "questions")


def trained(*paths: Path, method: str = "dynsparse", callbacks=(), resume: bool = False, **changes) -> FinetuneResult:
    return finetune(config(*paths, **changes), create(method), callbacks=callbacks, resume=resume)


def patterns(path: Path) -> list[list[int]]:
    return [layer.topology.keys().tolist() for _, layer in named_sparse_layers(load_saved(path))]


def test_a_fixed_pattern_learns_and_stays(encoder, reviews, tmp_path):
    result = trained(encoder, reviews, tmp_path / "run", epochs=3)
    assert result.finished and result.metrics["accuracy"] > 0.95
    assert set(result.metrics) == {"accuracy", "macro_f1", "ece"}
    assert patterns(tmp_path / "run") == patterns(encoder)
    assert result.density == pytest.approx(0.5)
    model = load_saved(tmp_path / "run")
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_a_dynamic_pattern_moves_at_its_density(encoder, reviews, tmp_path):
    result = trained(encoder, reviews, tmp_path / "run", topology="dynamic", n_updates=4, drop_fraction=0.5)
    assert result.density == pytest.approx(0.5)
    before, after = patterns(encoder), patterns(tmp_path / "run")
    assert [len(keys) for keys in before] == [len(keys) for keys in after] and before != after
    assert (tmp_path / "run" / "topology.jsonl").exists()


def test_a_densified_model_is_dense(encoder, reviews, tmp_path):
    result = trained(encoder, reviews, tmp_path / "run", topology="dense")
    assert result.density == 1.0 and not list(named_sparse_layers(load_saved(tmp_path / "run")))


def test_one_shot_keeps_the_strongest_blocks_of_a_dense_model(dense_encoder, reviews, tmp_path):
    result = trained(dense_encoder, reviews, tmp_path / "run", density=0.25, block_size=8)
    assert result.density == pytest.approx(0.25)
    weight = load_saved(dense_encoder).bert.encoder.layer[0].intermediate.dense.weight.detach()
    strength = weight.abs().view(8, 8, 4, 8).sum((1, 3)).flatten()
    kept = load_saved(tmp_path / "run").bert.encoder.layer[0].intermediate.dense
    assert isinstance(kept, BlockSparseLinear)
    assert sorted(kept.topology.keys().tolist()) == sorted(strength.topk(8).indices.tolist())


def test_gradual_pruning_ends_at_the_density(dense_encoder, reviews, tmp_path):
    result = trained(dense_encoder, reviews, tmp_path / "run", density=0.25, block_size=8, sparsify="gradual")
    assert result.density == pytest.approx(0.25)
    lines = metrics_without_clock(tmp_path / "run")
    assert any("update_n_dropped" in line for line in lines) or any("update_churn" in line for line in lines)


def test_scores_are_learned_too(encoder, reviews, tmp_path):
    result = trained(encoder, reviews, tmp_path / "run", task="regression", label_column="score", epochs=3)
    assert result.metrics["spearman"] > 0.8


def test_questions_are_answered_better_than_at_random(encoder, questions, tmp_path):
    windows = {"max_length": 32, "stride": 16, "query_length": 8}
    options = {"task": "squad", "text_columns": "", "label_column": None, **windows}
    result = trained(encoder, questions, tmp_path / "run", epochs=4, eval_steps=1000, **options)
    assert result.main_metric == "f1" and result.metrics["f1"] > 80.0  # one word in twelve is 8


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"topology": "dynamic", "n_updates": 8, "drop_fraction": 0.5},
        {"density": 0.25, "block_size": 8, "sparsify": "gradual", "n_updates": 8},
    ],
    ids=["fixed", "dynamic", "gradual"],
)
def test_an_interrupted_run_resumes_to_bitwise_the_same_end(encoder, dense_encoder, reviews, tmp_path, changes):
    model = dense_encoder if "density" in changes else encoder
    trained(model, reviews, tmp_path / "whole", **changes)
    stopped = trained(model, reviews, tmp_path / "cut", callbacks=[Interrupt(17)], **changes)
    assert not stopped.finished and stopped.step == 18
    assert trained(model, reviews, tmp_path / "cut", resume=True, **changes).finished
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert metrics_without_clock(tmp_path / "whole") == metrics_without_clock(tmp_path / "cut")


def edited(data: Path, folder: Path, name: str, change) -> Path:
    """A copy of a task with one file changed."""
    folder.mkdir()
    for file in data.iterdir():
        text = file.read_text()
        (folder / file.name).write_text(change(text) if file.name == name else text)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "train.csv",
            lambda t: t.replace("verdict", "label", 1),
            r"train.csv, line 1: no column 'verdict' among",
        ),
        (
            "dev.csv",
            lambda t: t.replace(",good,", ",fine,", 1),
            r"dev.csv, line \d+, column 'verdict': unknown label",
        ),
        ("dev.csv", lambda t: t.splitlines()[0] + "\n", r"dev.csv holds no examples"),
        ("train.csv", lambda t: t + "one,two\n", r"train.csv, line 258: 2 fields where 3 are expected"),
        ("train.csv", lambda t: t.replace('",', ",", 1), r"train.csv, line \d+: .*quotation mark"),
    ],
)
def test_a_wrong_task_file_is_named_with_its_line(encoder, reviews, tmp_path, name, change, message):
    data = edited(reviews, tmp_path / "data", name, change)
    with pytest.raises(RegrowError, match=message):
        trained(encoder, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 64}, "max_length=64 must lie between 8 and the 48 positions"),
        ({"task": "sst2", "text_columns": "", "label_column": None}, "no column 'sentence' among"),
        ({"task": "sst3"}, "task must be one of sst2"),
        ({"task": "regression", "label_column": "verdict"}, "line 2, column 'verdict': '(good|bad)' is no number"),
        ({"label_column": "score", "dev_data": "/nowhere/dev.csv"}, "data '/nowhere/dev.csv' does not exist"),
        ({"density": 0.5}, "is sparse already; --density is for dense models"),
        ({"sparsify": "gradual"}, "needs --density"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"model": "/nowhere"}, "/nowhere holds no model"),
        ({"task": "squad"}, "text_columns and label_column are for"),
    ],
)
def test_an_unusable_option_is_named_and_nothing_written(encoder, reviews, tmp_path, changes, message):
    with pytest.raises(RegrowError, match=message):
        trained(encoder, reviews, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_head_that_does_not_fit_is_refused(encoder, reviews, tmp_path):
    trained(encoder, reviews, tmp_path / "run", epochs=0.1)
    other = edited(reviews, tmp_path / "data", "dev.csv", lambda text: text)
    for file in other.iterdir():
        file.write_text(file.read_text().replace(",good,", ",fine,"))
    with pytest.raises(RegrowError, match=r"train.csv, line \d+, column 'verdict': unknown label 'fine'"):
        trained(tmp_path / "run", other, tmp_path / "second")
    with pytest.raises(RegrowError, match="has a head for bad, good, and task regression is about score"):
        trained(tmp_path / "run", reviews, tmp_path / "second", task="regression", label_column="score")
    assert not (tmp_path / "second").exists()


def test_command_line_trains_evaluates_predicts_and_compares(encoder, reviews, tmp_path, capsys):
    run, flags = tmp_path / "run", ["--epochs", "3", "--batch-size", "8", "--learning-rate", "3e-3"]
    columns = ["--text-columns", "review", "--label-column", "verdict"]
    table = ["--task", "classification", "--data", str(reviews), *columns]
    assert main(["finetune", "--model", str(encoder), *table, *flags, "--output", str(run)]) == 0
    shown = dict(line.removeprefix("held-out ").rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    assert float(shown["accuracy"]) > 0.95
    predictions = tmp_path / "predictions.tsv"
    assert main(["evaluate", str(run), "--predictions", str(predictions), "--json", str(tmp_path / "found.json")]) == 0
    again = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {name.replace(" ", "_"): value for name, value in again.items()}.items() <= shown.items()
    assert json.loads((tmp_path / "found.json").read_text())["accuracy"] == pytest.approx(
        float(shown["accuracy"]), abs=1e-4
    )
    lines = predictions.read_text().splitlines()
    assert lines[0] == "index\tlabel\tp(bad)\tp(good)" and len(lines) == 65
    assert main(["evaluate", str(run), "--predictions", str(predictions)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--against", str(encoder)]) == 0
    assert "sparse weights: churn" in capsys.readouterr().out
    assert main(["evaluate", str(encoder), *table]) == 2
    assert "without a head for classification" in capsys.readouterr().err
    assert main(["finetune", "--output", str(run), "--resume", "--epochs", "2"]) == 2
    assert "--resume continues a run as it was started" in capsys.readouterr().err
