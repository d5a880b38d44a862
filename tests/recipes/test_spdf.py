"""Sparse pre-training and dense fine-tuning in one command."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertForPreTraining

from finetuning import write_table
from recipe_runs import flags, interrupt_at
from regrow.bert.export import random_batches
from regrow.bert.saved import load_saved
from regrow.cli import main
from regrow.nn import densify, named_sparse_layers

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tasks") / "reviews", n=96)


def spdf(corpus: Path, reviews: Path, output: Path, **changes: object) -> list[str]:
    task = {
        "finetune_task": "classification",
        "finetune_data": reviews,
        "finetune_text_columns": "review",
        "finetune_label_column": "verdict",
        "finetune_epochs": 1.0,
        "finetune_batch_size": 8,
    }
    return ["recipe", "spdf", *flags(corpus, output, density=0.5, **(task | changes))]


@pytest.fixture(scope="module")
def finished(corpus: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spdf") / "whole"
    assert main(spdf(corpus, reviews, path)) == 0
    return path


def test_one_command_pretrains_sparse_and_finetunes_dense(finished: Path) -> None:
    sparse, dense = (load_saved(finished / name) for name in ("pretrain", "finetune"))
    layers = dict(named_sparse_layers(sparse))
    assert len(layers) == 6 and all(layer.density == 0.5 for layer in layers.values())
    assert not list(named_sparse_layers(dense)) and type(dense).__name__ == "BertForSequenceClassification"
    for name, layer in layers.items():  # weights that were absent have been trained
        weight = dense.get_submodule(name).weight
        absent = layer.to_dense() == 0
        assert absent.any() and (weight[absent] != 0).float().mean() > 0.9
    results = json.loads((finished / "results.json").read_text())
    assert results["pretrain"]["density"] == 0.5 and results["finetune"]["metric"] == "accuracy"


def test_densifying_changes_no_logit(finished: Path) -> None:
    sparse = load_saved(finished / "pretrain", BertForPreTraining)
    dense = densify(load_saved(finished / "pretrain", BertForPreTraining))
    assert not list(named_sparse_layers(dense))
    with torch.no_grad():
        for batch in random_batches(sparse.config):
            for ours, theirs in zip(sparse(**batch).to_tuple(), dense(**batch).to_tuple(), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stage", "word"), [("pretrain", "pre-training"), ("finetune", "fine-tuning")])
def test_it_goes_on_where_it_was_stopped(
    stage: str,
    word: str,
    corpus: Path,
    reviews: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "spdf"
    with monkeypatch.context() as patch:
        interrupt_at(7, stage, patch)
        assert main(spdf(corpus, reviews, path)) == 130
    assert f"stopped in {word}" in capsys.readouterr().out
    assert main(["recipe", "spdf", "--output", str(path), "--resume"]) == 0
    results = [json.loads((folder / "results.json").read_text()) for folder in (path, finished)]
    assert results[0] == results[1]
    states = [load_saved(folder / "finetune").state_dict() for folder in (path, finished)]
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": True}, "spdf pre-trains a sparse model"),
        ({"method": "acdc"}, "method 'acdc' trains a dense one"),
        ({"finetune_epochs": -1.0}, "epochs must be positive, got -1.0 (options of the fine-tuning begin with"),
        ({"finetune_data": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"finetune_text_columns": "title"}, "title"),
    ],
)
def test_mistakes_of_either_training_are_named_before_the_first(
    changes: dict, message: str, corpus: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(spdf(corpus, reviews, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
