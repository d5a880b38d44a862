"""Random search: only the pattern differs, and the spread is that of the records."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from pretraining import config
from recipe_runs import flags
from regrow import RegrowError
from regrow.bert.model import build_model
from regrow.bert.pretrain import pretrain
from regrow.bert.repattern import repattern_
from regrow.bert.saved import load_saved
from regrow.bert.sizes import bert_config
from regrow.cli import main
from regrow.methods import create
from regrow.nn import named_sparse_layers
from regrow.recipes.random_search import RandomSearchConfig, RandomSearchResult
from regrow.study.spec import RunSpec

pytestmark = pytest.mark.usefixtures("cache")


def search(corpus: Path, output: Path, **changes: object) -> list[str]:
    return ["recipe", "random-search", *flags(corpus, output, density=0.5, threads=1, **changes)]


def test_patterns_differ_and_nothing_else_does() -> None:
    models = []
    for seed in (0, 1):
        model = build_model(bert_config("1/32/2", vocab_size=50, max_length=16), density=0.5, block_size=8, seed=4)
        repattern_(model, pattern_seed=seed, weight_seed=4)
        models.append(model)
    one, other = (dict(named_sparse_layers(model)) for model in models)
    for name, layer in one.items():
        assert layer.topology.n_blocks == other[name].topology.n_blocks
        assert layer.topology.keys().tolist() != other[name].topology.keys().tolist()
        both = (layer.to_dense() != 0) & (other[name].to_dense() != 0)
        assert both.any() and torch.equal(layer.to_dense()[both], other[name].to_dense()[both])


def test_a_pattern_seed_decides_the_pattern_and_the_seed_the_rest(corpus: Path, tmp_path: Path) -> None:
    class StartedError(Exception):
        pass

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            raise StartedError

    def start(name: str, **changes: object) -> dict[str, torch.Tensor]:
        look = Look()
        settings = config(corpus, tmp_path / name, size="1/32/2", block_size=8, method="static", **changes)
        with pytest.raises(StartedError):
            pretrain(settings, create("static"), callbacks=[look])
        return look.state

    one, other, again = start("a", pattern_seed=0), start("b", pattern_seed=1), start("c", pattern_seed=0)
    assert all(torch.equal(again[key], tensor) for key, tensor in one.items())
    sparse = [key for key in one if ".values" in key or ".topology." in key]
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items() if key not in sparse)
    assert any(not torch.equal(other[key], one[key]) for key in sparse)
    seeded = start("d", pattern_seed=0, seed=9)
    names = [key for key in sparse if key.endswith("topology.col_idx")]
    assert names and all(torch.equal(seeded[key], one[key]) for key in names)
    assert not torch.equal(seeded[names[0].replace("topology.col_idx", "values")], one[sparse[0]])


def test_the_spread_is_that_of_the_records_and_finished_trainings_are_kept(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "search"
    assert main(search(corpus, path, topologies=2, pattern_seed=5, keep_models=True)) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    records = {file: json.loads(file.read_text()) for file in sorted((path / "records").glob("*.json"))}
    losses = {str(r["config"]["pattern_seed"]): r["final"]["eval_mlm_loss"] for r in records.values()}
    assert set(losses) == {"5", "6"} and len(set(losses.values())) == 2
    for name, value in losses.items():
        assert float(shown[name]) == pytest.approx(value, abs=1e-4)
    found = list(losses.values())
    expected = {
        "mean": statistics.fmean(found), "std": statistics.stdev(found), "min": min(found), "max": max(found)
    }  # fmt: skip
    for name, value in expected.items():
        assert float(shown[name]) == pytest.approx(value, abs=1e-4)
    models = [load_saved(folder / "run") for folder in (path / "runs").iterdir()]
    patterns = [[layer.topology.keys().tolist() for _, layer in named_sparse_layers(m)] for m in models]
    assert len(models) == 2 and patterns[0] != patterns[1]

    lost = next(iter(records))
    lost.unlink()  # as if it had been killed before it finished
    kept = next(file for file in records if file != lost)
    before = kept.stat().st_mtime_ns
    assert main(["recipe", "random-search", "--output", str(path), "--resume"]) == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["final"] == pytest.approx(records[lost]["final"])


def test_a_spread_needs_losses_and_says_what_is_missing() -> None:
    assert RandomSearchResult(Path("x"), [(0, None)], finished=True).spread == {}
    stopped = RandomSearchResult(Path("x"), [(0, 2.0)], finished=False)
    assert "1 are finished" in str(stopped) and "regrow recipe random-search --output x --resume" in str(stopped)
    result = RandomSearchResult(Path("x"), [(0, 2.0), (1, 4.0)], finished=True)
    assert result.spread == pytest.approx({"mean": 3.0, "std": 2**0.5, "min": 2.0, "max": 4.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "set"}, "patterns that stay"),
        ({"topologies": 1}, "at least 2, or there is no spread"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        replace(RandomSearchConfig(), **changes).check()


def test_the_pattern_seed_is_part_of_a_run_unless_it_is_dense() -> None:
    assert RunSpec({"pattern_seed": 0}) != RunSpec({"pattern_seed": 1}) != RunSpec({})
    assert RunSpec({"dense": True, "pattern_seed": 0}) == RunSpec({"dense": True})
