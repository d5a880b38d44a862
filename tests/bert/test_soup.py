"""Greedy soups from the command line, by what the runs held out."""

from pathlib import Path

import pytest
import torch

from finetuning import config, write_encoder, write_table
from regrow.bert.finetune import finetune
from regrow.bert.saved import load_saved
from regrow.cli import main
from regrow.cli.evaluate import scorer
from regrow.methods import create


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    encoder, reviews = write_encoder(folder / "encoder"), write_table(folder / "reviews", n=96)
    paths = []
    for seed, rate in ((1, 3e-3), (2, 3e-3), (3, 1e-6)):  # the last learns nothing
        settings = config(encoder, reviews, folder / f"seed{seed}", seed=seed, learning_rate=rate, epochs=2.0)
        paths.append(finetune(settings, create("static")).path)
    return paths


def test_a_greedy_soup_is_at_least_as_good_as_its_best_model(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    score = scorer(str(runs[0]))
    single = {str(run): score(load_saved(run)) for run in runs}
    assert main(["export", "soup", str(tmp_path / "soup"), *map(str, runs), "--greedy"]) == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    chosen = second.removeprefix("best first: ").split(", ")
    assert single[chosen[0]] == max(single.values())
    assert first == f"{tmp_path / 'soup'}: the average of {len(chosen)} models"
    assert score(load_saved(tmp_path / "soup")) >= max(single.values())
    names = ("bert.encoder.layer.0.output.dense.values", "classifier.bias")
    for name in names:
        mean = torch.stack([load_saved(run).get_parameter(name) for run in chosen]).mean(0)
        torch.testing.assert_close(load_saved(tmp_path / "soup").get_parameter(name), mean)


def test_scores_need_a_run(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", "soup", str(tmp_path / "two"), str(runs[0]), str(runs[1])]) == 0
    assert main(["export", "soup", str(tmp_path / "x"), str(tmp_path / "two"), str(runs[0]), "--greedy"]) == 2
    assert "is no run, so nothing says what it is to be evaluated on" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
