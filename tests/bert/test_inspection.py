"""What `regrow inspect` says of a saved model, and what of models it cannot."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

import regrow
from pretraining import config
from regrow.bert.inspection import inspect_layer, inspect_model, read_history
from regrow.bert.pattern_plot import grid_of, pattern, plot_patterns
from regrow.bert.pretrain import pretrain
from regrow.bert.saved import load_saved
from regrow.cli import main
from regrow.errors import RegrowError
from regrow.methods import create
from regrow.nn import BlockSparseLinear, named_sparse_layers

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates fall on steps 4, 8, 12, 16, and of the larger layers on 20; checkpoints on 10, 20 and the end."""
    path = tmp_path_factory.mktemp("runs") / "sparse"
    pretrain(config(corpus, path, save_steps=10, keep_checkpoints=9), create("dynsparse"))
    return path


@pytest.fixture(scope="module")
def masked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "acdc"
    pretrain(config(corpus, path, method="acdc", save_steps=10, steps=10), create("acdc"))
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to do damage to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def inspect(*argv: object) -> int:
    return main(["inspect", *map(str, argv)])


def data(path: Path, tmp_path: Path, *more: str) -> dict:
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    assert inspect(path, "--json", file, *more) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize(("block_size", "density"), [(1, 0.05), (4, 0.3), (16, 0.2), (16, 1.0)])
def test_numbers_are_those_of_the_dense_weight(block_size: int, density: float) -> None:
    layer = BlockSparseLinear(64, 96, block_size=block_size, density=density)
    layer.values.data[0] = 0  # a block of zeros reaches nothing
    if block_size > 1:
        layer.values.data[:, 0] = 0
    report, dense = inspect_layer("x", layer), layer.to_dense().double()
    assert report.norm == pytest.approx(float(dense.norm()))
    assert report.mean_abs == pytest.approx(float(dense.abs().sum()) / layer.values.numel())
    assert report.dead_outputs == int((dense == 0).all(1).sum())
    assert report.dead_inputs == int((dense == 0).all(0).sum())
    assert report.n_blocks / (96 * 64 / block_size**2) == report.density == layer.density


def test_totals_are_those_of_the_densified_model() -> None:
    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )
    dense = sum(p.numel() for p in bert.parameters())
    report = inspect_model(regrow.sparsify(bert, density=0.25, block_size=16, include="encoder.*"))
    assert report.dense_parameters == dense and report.density == 0.25 and len(report.layers) == 12
    assert report.parameters == sum(p.numel() for p in bert.parameters()) < dense
    assert report.stored_bytes < report.dense_bytes


def test_the_table_has_a_line_per_layer_and_says_the_prefix_once(finished: Path, capsys: pytest.CaptureFixture) -> None:
    assert inspect(finished) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{finished}: BertForPreTraining, 12 sparse layers"
    assert lines[1] == "names begin with bert.encoder.layer." and "bert.encoder" not in "".join(lines[2:])
    assert lines[3].split()[:6] == ["0.attention.self.query", "128", "x", "128", "16", "13"]
    assert lines[3].split()[-1] == "16"  # the last update moves less than half a block of the small layers
    assert len({len(line) for line in lines[2:-1]}) == 1
    assert len(lines) == 16 and "bytes stored" in lines[-1]


def test_history_is_the_last_line_of_the_log(finished: Path, tmp_path: Path) -> None:
    updates = [json.loads(line) for line in (finished / "topology.jsonl").read_text().splitlines()]
    for layer in data(finished, tmp_path)["layers"]:
        last = [update for update in updates if update["layer"] == layer["name"]][-1]
        shown = layer["coverage"], layer["churn"], layer["last_update"]
        assert shown == (last["coverage"], last["churn"], last["step"])


@pytest.mark.parametrize(("step", "last"), [(10, {8}), (20, {16, 20})])
def test_a_checkpoint_knows_nothing_of_what_came_after_it(
    finished: Path, tmp_path: Path, step: int, last: set[int]
) -> None:
    checkpoint = finished / "checkpoints" / f"checkpoint-{step}"
    inside = data(checkpoint, tmp_path)["layers"]
    assert {layer["last_update"] for layer in inside} == last
    moved_away = Path(shutil.copytree(checkpoint, tmp_path / "alone"))  # where only its own state is left
    assert data(moved_away, tmp_path)["layers"] == [layer | {"churn": None} for layer in inside]


def test_an_unfinished_run_is_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    (run / "config.json").unlink()
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-24", ignore_errors=True)
    expected = data(run / "checkpoints" / "checkpoint-20", tmp_path)
    assert data(run, tmp_path)["layers"] == expected["layers"]


def test_a_model_without_a_past_has_dashes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load_saved(finished).save_pretrained(tmp_path / "model")
    assert inspect(tmp_path / "model") == 0
    assert capsys.readouterr().out.splitlines()[3].split()[-3:] == ["-", "-", "-"]
    layer = data(tmp_path / "model", tmp_path)["layers"][0]
    assert layer["coverage"] is layer["churn"] is layer["last_update"] is None


def test_a_glob_chooses_layers(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = data(finished, tmp_path, "--layers", "*.query")
    assert [layer["name"] for layer in found["layers"]] == [QUERY, QUERY.replace("0", "1")]
    assert inspect(finished, "--layers", "query") == 2
    assert "matches none of the 12 sparse layers, such as bert.encoder" in capsys.readouterr().err


def test_numbers_that_are_none_are_shown_and_saved_as_null(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{QUERY}.values"][0, 0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    layer = data(run, tmp_path)["layers"][0]
    assert layer["norm"] is None and layer["mean_abs"] is None
    assert capsys.readouterr().out.splitlines()[3].split()[7:9] == ["nan", "nan"]
    cells = pattern(dict(named_sparse_layers(load_saved(run)))[QUERY])
    assert int(cells.isinf().sum()) == 1


def test_cells_of_a_pattern_are_blocks_or_bins_of_them() -> None:
    layer = BlockSparseLinear(48, 32, block_size=4, density=0.2)
    dense = layer.to_dense().double()
    blocks = dense.view(8, 4, 12, 4)
    torch.testing.assert_close(pattern(layer).nan_to_num(0), blocks.square().mean((1, 3)).sqrt())
    assert int(pattern(layer).isfinite().sum()) == layer.topology.n_blocks
    bins = dense.view(2, 16, 2, 24).square().mean((1, 3)).sqrt()
    torch.testing.assert_close(pattern(layer, edge=2).nan_to_num(0), bins)
    uneven = pattern(layer, edge=5)  # 8 and 12 blocks do not fall into five equal cells
    heights, widths = (np.bincount(np.arange(n) * 5 // n) * 4 for n in (8, 12))
    area = torch.tensor(np.outer(heights, widths))
    assert float((uneven.nan_to_num(0).square() * area).sum()) == pytest.approx(float(dense.square().sum()))


def test_the_grid_is_the_encoder_or_wrapped() -> None:
    names = [f"bert.encoder.layer.{i}.{part}" for i in (10, 9) for part in ("output.dense", "attention.self.query")]
    grid, is_encoder = grid_of(names[:3])
    assert is_encoder and grid == [[None, names[2]], [names[1], names[0]]]
    grid, is_encoder = grid_of([f"head{i}" for i in range(8)])
    assert not is_encoder and [len(row) for row in grid] == [6, 6] and grid[1][2:] == [None] * 4


def test_a_picture_has_a_panel_per_layer(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert inspect(finished, "--plot", tmp_path / "a.svg") == 0
    svg = (tmp_path / "a.svg").read_text()
    assert svg.count("<image") == 13  # and the scale
    assert all(f"<!-- {text} -->" in svg for text in ("Q  128 x 128", "FFN1  512 x 128", "layer 1"))
    plain = nn.ModuleDict({"$a_{": BlockSparseLinear(32, 32, block_size=16, density=0.5)})  # no formula
    plot_patterns(dict(named_sparse_layers(plain)), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.png"]


def test_nothing_is_overwritten_or_left_half(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    for argv, why in (
        (["--json", taken], "exists; choose another name"),
        (["--plot", tmp_path / "a.txt"], "ends in one of .png, .svg, .pdf"),
        (["--json", tmp_path / "a.png", "--plot", tmp_path / "a.png"], "name two files"),
    ):
        assert inspect(finished, *argv) == 2
        captured = capsys.readouterr()
        assert why in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]


def test_a_dense_model_and_a_masked_one_are_told_apart(
    finished: Path, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    regrow.densify(load_saved(finished)).save_pretrained(tmp_path / "dense")
    assert inspect(tmp_path / "dense") == 2
    assert "is a dense model: it has no sparse layer" in capsys.readouterr().err
    for path in (masked, masked / "checkpoints" / "checkpoint-10"):
        assert inspect(path) == 2
        assert "12 masked layers keep dense weights" in capsys.readouterr().err


def cut_short(run: Path) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def column_out_of_range(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors[f"{QUERY}.topology.col_idx"][0] = 999
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def log_line(**changes: object) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        lines = (run / "topology.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | changes)
        (run / "topology.jsonl").write_text("\n".join(lines) + "\n")

    return damage


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_short, "model.safetensors is damaged"),
        (column_out_of_range, "col_idx must lie in [0, 8)"),
        (log_line(coverage=2), "coverage of bert.encoder.layer.1.output.dense in step 20 does not lie between 0 and 1"),
        (log_line(churn=None), "churn of"),
        (log_line(layer=[3]), "without step or layer"),
        (lambda run: (run / "topology.jsonl").write_bytes(b"\xff\xfe"), "topology.jsonl cannot be read"),
        (shutil.rmtree, "holds no model"),
    ],
)
def test_damage_is_one_line(
    run: Path, tmp_path: Path, damage: Callable[[Path], None], why: str, capsys: pytest.CaptureFixture
) -> None:
    damage(run)
    assert inspect(run, "--json", tmp_path / "x.json") == 2
    captured = capsys.readouterr()
    assert why in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("name", "index", "value", "why"),
    [
        ("counters", 1, 99, "counters are 10 steps with the last update at 99"),
        (f"{QUERY}.explored", slice(None), 0, "explored lacks positions that hold a block"),
        (f"{QUERY}.allocated_at", 0, 11, "allocated_at must lie between 0 and 10"),
    ],
)
def test_a_damaged_state_of_a_checkpoint_is_one_line(
    run: Path, name: str, index: object, value: int, why: str, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-10"
    state = load_file(checkpoint / "topology_state.safetensors")
    state[name][index] = value
    save_file(state, checkpoint / "topology_state.safetensors")
    assert inspect(checkpoint) == 2
    assert why in capsys.readouterr().err
    del state[name]
    save_file(state, checkpoint / "topology_state.safetensors")
    assert inspect(checkpoint) == 2
    error = capsys.readouterr().err
    assert f"{name} must be torch." in error and len(error.splitlines()) == 1


def test_a_line_cut_short_by_a_kill_is_left_out(run: Path) -> None:
    with (run / "topology.jsonl").open("a") as file:
        file.write('{"step": 24, "layer": "bert')
    assert {history.last_update for history in read_history(run).values()} == {16, 20}


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--plot patterns.png" in shown and "--layers GLOB" in shown and "RUN|MODEL" in shown


def test_a_library_caller_is_told_too() -> None:
    with pytest.raises(RegrowError, match="Sequential is dense"):
        inspect_model(nn.Sequential(nn.Linear(3, 3)))
