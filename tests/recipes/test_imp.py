"""Iterative magnitude pruning: what goes, what comes back, and that nothing is done twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipe_runs import STEPS, TRAINING, flags, interrupt_at
from regrow import BlockSparseLinear, RegrowError
from regrow.bert.model import BertForPreTraining
from regrow.bert.pretrain import PretrainConfig, pretrain
from regrow.bert.run import RunDirectory
from regrow.bert.saved import load_saved
from regrow.cli import main
from regrow.methods import create
from regrow.methods.scores import block_norm
from regrow.nn import named_sparse_layers
from regrow.recipes.base import pretraining
from regrow.recipes.imp import ImpConfig
from regrow.recipes.pruning import globally_kept, prune_checkpoint

pytestmark = pytest.mark.usefixtures("cache")
REWIND = 4


def imp(corpus: Path, output: Path, *more: str, **changes: object) -> int:
    return main(["recipe", "imp", *flags(corpus, output, rewind_step=REWIND, rounds=2, **changes), *more])


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imp") / "whole"
    assert imp(corpus, path) == 0
    return path


def layers(path: Path) -> dict[str, BlockSparseLinear]:
    return dict(named_sparse_layers(load_saved(path, BertForPreTraining)))


def positions(path: Path) -> dict[str, set[int]]:
    return {name: set(layer.topology.keys().tolist()) for name, layer in layers(path).items()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_each_round_prunes_a_fifth_of_all_blocks_together(finished: Path) -> None:
    sizes = [sum(map(len, positions(finished / f"round-{number}").values())) for number in range(3)]
    n = sum(layer.topology.n_positions for layer in layers(finished / "round-0").values())
    assert sizes == [n, n - round(0.2 * n), n - round(0.2 * n) - round(0.2 * (n - round(0.2 * n)))]
    counts = {len(kept) for name, kept in positions(finished / "round-1").items() if "attention" in name}
    assert len(counts) > 1  # ranked over all layers, not within each


def test_the_weakest_of_the_round_before_go(finished: Path) -> None:
    for number in (1, 2):
        before, kept = layers(finished / f"round-{number - 1}"), positions(finished / f"round-{number}")
        stays, goes = [], []
        for name, layer in before.items():
            for key, norm in zip(layer.topology.keys().tolist(), block_norm(layer.values).tolist(), strict=True):
                (stays if key in kept[name] else goes).append(norm)
        assert goes and max(goes) <= min(stays)


def test_survivors_go_back_to_the_values_and_moments_of_the_step(finished: Path, tmp_path: Path) -> None:
    rewind = finished / "rewind" / f"checkpoint-{REWIND}"
    kept = {name: torch.tensor(sorted(keys)) for name, keys in positions(finished / "round-2").items()}
    target = tmp_path / rewind.name
    prune_checkpoint(rewind, target, kept, PretrainConfig(**TRAINING, density=1.0, method="static"))
    old, new = layers(rewind), layers(target)
    for name, layer in new.items():
        slot_of = {key: slot for slot, key in enumerate(old[name].topology.keys().tolist())}
        source = [slot_of[key] for key in layer.topology.keys().tolist()]
        assert torch.equal(layer.values, old[name].values[source])
        assert sorted(layer.topology.keys().tolist()) == kept[name].tolist()
    others = {key: t for key, t in weights(rewind).items() if ".values" not in key and ".topology." not in key}
    assert all(torch.equal(weights(target)[key], tensor) for key, tensor in others.items())
    state = [load_file(folder / "training_state.safetensors") for folder in (rewind, target)]
    changed = [key for key in state[0] if not torch.equal(state[0][key], state[1][key])]
    assert len(changed) == 2 * len(new)  # the moments of each layer, and nothing else
    assert all(state[1][key].shape[0] < state[0][key].shape[0] for key in changed)
    assert not torch.equal(layers(finished / "round-0")[name].values[source], layer.values)  # it had trained on


def test_a_round_that_prunes_nothing_is_the_first_one_again(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = PretrainConfig(**TRAINING, data=str(corpus), output=str(tmp_path / "again"), density=1.0, method="static")
    shutil.copytree(finished / "round-0", config.output)
    run = RunDirectory(config.output)
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    everything = {name: torch.tensor(sorted(keys)) for name, keys in positions(finished / "round-0").items()}
    rewind = finished / "rewind" / f"checkpoint-{REWIND}"
    prune_checkpoint(rewind, run.checkpoints / rewind.name, everything, config)
    (run.path / "model.safetensors").unlink()
    assert pretrain(config, create("static"), resume=True).finished
    first, again = weights(finished / "round-0"), weights(run.path)
    assert first.keys() == again.keys() and all(torch.equal(again[key], tensor) for key, tensor in first.items())


def test_an_interrupted_recipe_goes_on_to_the_same_end(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "imp"
    with monkeypatch.context() as patch:
        interrupt_at(7, "round-1", patch)
        assert imp(corpus, path) == 130
    shown = capsys.readouterr().out
    assert f"continue with: regrow recipe imp --output {path} --resume" in shown and "stopped in round 1" in shown
    first = (path / "round-0" / "model.safetensors").stat().st_mtime_ns
    assert main(["recipe", "imp", "--output", str(path), "--resume"]) == 0
    assert (path / "round-0" / "model.safetensors").stat().st_mtime_ns == first  # not trained again
    for number in range(3):
        ours, theirs = weights(path / f"round-{number}"), weights(finished / f"round-{number}")
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    results = [json.loads((folder / "results.json").read_text()) for folder in (path, finished)]
    assert results[0] == results[1] and list(results[0]) == ["round-0", "round-1", "round-2"]
    capsys.readouterr()
    assert main(["recipe", "imp", "--output", str(path), "--resume"]) == 0  # nothing is left
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["round", "0", "1", "2", "models:"]
    assert float(lines[3].split()[-1]) == pytest.approx(results[0]["round-2"]["loss"], abs=1e-4)


def test_killed_between_checkpoint_and_copy_it_still_knows_where_to_go_back(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "imp"
    with monkeypatch.context() as patch:
        interrupt_at(REWIND, "round-0", patch)
        assert imp(corpus, path) == 130
    shutil.rmtree(path / "rewind")
    assert main(["recipe", "imp", "--output", str(path), "--resume"]) == 0
    assert (path / "rewind" / f"checkpoint-{REWIND}" / "manifest.json").exists()


def test_what_is_there_is_not_overwritten_and_options_do_not_change(
    corpus: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert imp(corpus, finished) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["recipe", "imp", "--output", str(finished), "--resume", "--rounds", "3"]) == 2
    assert "--resume continues a run as it was started, with --rounds 2" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dynsparse"}, "so method 'dynsparse' cannot: give --method static, and with a preset also the"),
        ({"dense": True}, "leave --dense out"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"prune_share": 1.0}, "prune_share must lie between 0 and 1"),
        ({"rewind_step": STEPS}, f"rewind_step must lie between 1 and steps - 1 = {STEPS - 1}"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(RegrowError, match=message):
        ImpConfig(**(TRAINING | {"output": str(tmp_path / "imp")} | changes)).check()
    assert not (tmp_path / "imp").exists()


def test_damage_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "imp"
    shutil.copytree(finished, path)
    (path / "results.json").write_text('{"round-0": {"density": 1.0, "n_blocks": 96}}')
    assert main(["recipe", "imp", "--output", str(path), "--resume"]) == 2
    assert "'round-0' lacks 'loss'" in capsys.readouterr().err
    rewind = tmp_path / "imp" / "rewind" / f"checkpoint-{REWIND}"
    (rewind / "model.safetensors").write_bytes(b"no weights")
    config = pretraining(ImpConfig(**TRAINING))
    with pytest.raises(RegrowError, match=r"model.safetensors is damaged .*; begin the recipe anew"):
        prune_checkpoint(rewind, tmp_path / "new", {}, config)
    assert not (tmp_path / "new").exists()


def test_a_layer_keeps_its_strongest_block_and_sizes_must_agree() -> None:
    weak, strong = (BlockSparseLinear(32, 32, block_size=8, density=1.0) for _ in range(2))
    weak.values.data.mul_(1e-6)
    kept = globally_kept({"weak": weak, "strong": strong}, 0.9)
    strongest = int(block_norm(weak.values).argmax())
    assert kept["weak"].tolist() == [int(weak.topology.keys()[strongest])]
    assert len(kept["strong"]) == round(0.1 * 32) - 1
    with pytest.raises(RegrowError, match="one block size"):
        globally_kept({"a": weak, "b": BlockSparseLinear(32, 32, block_size=16, density=1.0)}, 0.5)
