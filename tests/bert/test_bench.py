"""The benchmark of a whole step runs and adds up; nothing here depends on how fast the machine is."""

import json
from pathlib import Path

import pytest

from regrow.bert.bench import StepConfig, bench_step
from regrow.cli import main
from regrow.errors import RegrowError

TINY = ["--size", "2/32", "--batch-size", "2", "--max-length", "16", "--vocab-size", "60", "--rounds", "1"]


def test_step_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "step.json"
    assert main(["bench", "step", *TINY, "--block-size", "8", "--density", "0.25", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["speedup"] == pytest.approx(result["dense_seconds"] / result["sparse_seconds"])
    assert result["density"] == pytest.approx(0.25, abs=0.01)
    assert {"processor", "threads", "isa", "torch"} <= result["machine"].keys()
    assert "scaled_dot_product_attention" in result["baseline"]
    for name in ("dense", "sparse", "dense_fused"):
        assert result["tokens_per_second"][name] == pytest.approx(32 / result[f"{name}_seconds"])
        assert all(seconds > 0 for seconds in result["parts"][name].values())
        memory = result["memory"][name]
        assert memory["peak"] > memory["state"] > 0 and memory["activations"] > 0
    assert result["memory"]["sparse"]["state"] < result["memory"]["dense"]["state"]
    assert {"sparse products", "feed-forward, fused", "attention"} <= result["parts"]["sparse"].keys()
    assert "dense products" in result["parts"]["dense"]
    assert "dense over sparse" in capsys.readouterr().out


def test_encoder_alone_has_no_head_and_no_optimizer() -> None:
    small = {"batch_size": 2, "max_length": 16, "vocab_size": 60, "rounds": 1, "dropout": 0.0}
    result = bench_step(StepConfig("2/32", encoder_only=True, **small))
    for parts in result["parts"].values():
        assert "vocabulary head" not in parts
    whole = bench_step(StepConfig("2/32", dense_size="1/32", **small))
    assert whole["memory"]["dense"]["state"] < result["memory"]["dense"]["state"] * 2


def test_each_fusion_is_measured_off_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    path, picture = tmp_path / "step.json", tmp_path / "step.png"
    flags = [
        "--fuse",
        "norm,loss",
        "--block-size",
        "8",
        "--blocks",
        "4,16",
        "--ablate",
        "--json",
        str(path),
        "--plot",
        str(picture),
    ]
    assert main(["bench", "step", *TINY, *flags, "--json", str(path), "--plot", str(picture)]) == 0
    result = json.loads(path.read_text())
    assert set(result["without"]) == {"norm", "loss", "all"} and set(result["by_block"]) == {"4", "16"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0}, "density"),
        ({"block_size": 64}, "block_size"),
        ({"rounds": 0}, "rounds"),
        ({"fuse": "x"}, "'x'"),
    ],
)
def test_impossible_values_are_refused(change: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        bench_step(StepConfig("2/32", **change))


@pytest.mark.parametrize("flags", [["step", "--density", "much"], ["steps"], []])
def test_bad_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
