"""Benchmarks run, add up, and are remembered; nothing here depends on how fast the machine is."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import regrow
from regrow.bench import advise
from regrow.cli import main
from regrow.nn.speed import LayerSpeed, known_speeds, speeds_file, store_speeds


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))


def test_bench_kernels_writes_rows_that_add_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "speed.json"
    flags = ["--shapes", "64x128", "--blocks", "4,16", "--densities", "0.25,0.5", "--tokens", "32", "--rounds", "2"]
    assert main(["bench", "kernels", *flags, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {"processor", "threads", "isa", "torch"} <= document["machine"].keys()
    assert document["machine"]["onednn_over_linear"] > 0
    rows = document["rows"]
    assert [(r["block_size"], r["density"]) for r in rows] == [(4, 0.25), (4, 0.5), (16, 0.25), (16, 0.5)]
    for row in rows:
        assert (row["in_features"], row["out_features"], row["tokens"]) == (64, 128, 32)
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
        assert row["eps"] == pytest.approx(1 / (row["density"] * row["speedup"]))
        assert row["sparse_gflops"] == pytest.approx(6 * 32 * 64 * 128 * row["density"] / row["sparse_seconds"] / 1e9)
        assert row["index_seconds"] > 0
    assert "critical" in capsys.readouterr().out


@pytest.mark.parametrize("ratio", [None, 1.1, 2.4])
def test_a_slow_dense_baseline_is_told_of(
    ratio: float | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("regrow.bench.baseline.onednn_over_linear", lambda place=None: ratio)
    flags = ["--shapes", "64x32", "--blocks", "16", "--densities", "0.5", "--tokens", "8", "--rounds", "1"]
    assert main(["bench", "kernels", *flags]) == 0
    told = capsys.readouterr().err
    assert ("dense matrices 2.4 times as fast" in told) == (ratio == 2.4)


def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    path = tmp_path / "roof.png"
    flags = ["--shapes", "64x32", "--blocks", "4,16", "--densities", "0.5", "--tokens", "8", "--rounds", "1"]
    assert main(["bench", "kernels", *flags, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_peers_are_measured_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "speed.json"
    flags = ["--shapes", "64x32", "--blocks", "16", "--densities", "0.5", "--tokens", "8", "--rounds", "1"]
    assert main(["bench", "kernels", *flags, "--peers", "--json", str(path)]) == 0
    peers = json.loads(path.read_text())["peers"]
    assert [(p["layout"], p["block_size"]) for p in peers[:2]] == [("torch csr", 1), ("torch bsr", 16)]
    assert peers[0]["seconds"] > 0 and "torch csr" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--shapes", "64by64"], ["--blocks", "four"], ["--rounds", "x"], []])
def test_bad_bench_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *(["kernels", *flags] if flags else [])])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_block_that_does_not_divide_a_shape_is_an_error(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "kernels", "--shapes", "60x60", "--blocks", "16", "--tokens", "8"]) == 2
    assert "block_size 16 does not divide in_features=60" in capsys.readouterr().err


def test_advice_is_measured_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main(["advise", "64x64", "--blocks", "4,16", "--tokens", "16"]) == 0
    first = capsys.readouterr().out
    assert "break-even sparsity" in first
    assert [(s.in_features, s.block_size) for s in known_speeds()] == [(64, 4), (64, 16)]
    monkeypatch.setattr(advise, "_measure", lambda *_: pytest.fail("measured again"))
    assert main(["advise", "64x64", "--blocks", "4,16", "--tokens", "16"]) == 0
    assert capsys.readouterr().out == first


def test_the_line_through_two_densities_is_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.bench.kernels import Row

    def measured(*, densities, **_):
        return [Row(64, 64, 8, d, 16, 10.0, 2.0 + 20.0 * d, 0, 0, 0, 0, 0, 0) for d in densities]

    monkeypatch.setattr(advise, "bench_kernels", measured)
    [speed] = advise.advise([(64, 64)], blocks=[16], tokens=8)
    assert speed.fixed_seconds == pytest.approx(2.0) and speed.seconds_per_density == pytest.approx(20.0)
    assert speed.break_even_density == pytest.approx(0.4) and speed.speedup(0.1) == pytest.approx(2.5)


def test_advice_for_something_unknown_is_an_error(capsys: pytest.CaptureFixture) -> None:
    assert main(["advise", "gigantic"]) == 2
    assert "'gigantic' is no size (tiny" in capsys.readouterr().err


def test_sparsify_warns_where_the_machine_was_measured_to_be_slower() -> None:
    store_speeds([LayerSpeed(64, 64, 16, 4096, 1.0, 0.5, 1.0)])  # break-even at density 0.5
    with pytest.warns(UserWarning, match=r"slower than dense on this machine at block_size 16: 0 \(0.71x\)"):
        regrow.sparsify(nn.Sequential(nn.Linear(64, 64)), density=0.9, block_size=16, on_slow="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrow.sparsify(nn.Sequential(nn.Linear(64, 64)), density=0.1, block_size=16, on_slow="warn")
    with pytest.warns(UserWarning, match="regrow advise 64x32 --blocks 16"):
        regrow.sparsify(nn.Sequential(nn.Linear(64, 32)), density=0.1, block_size=16, on_slow="warn")


@pytest.mark.parametrize("damage", ["", "[1]", '[{"in_features": 1}]', "{"])
def test_a_damaged_store_counts_as_unknown(damage: str) -> None:
    store_speeds([LayerSpeed(64, 64, 16, 4096, 1.0, 0.5, 1.0)])
    speeds_file().write_text(damage)
    assert known_speeds() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "abacus"], "device must be cpu or cuda, got 'abacus'"),
        (["--device", "meta"], "device must be cpu or cuda, got 'meta'"),
        (["--dtype", "int4"], "dtype must be one of float32, bf16, fp16, got 'int4'"),
        (["--dtype", "bf16"], "dtype='bf16' needs device='cuda'"),
    ],
)
@pytest.mark.parametrize("command", ["kernels", "step"])
def test_a_place_that_there_is_not(command: str, flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", command, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "device='cuda' needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    flags = ["--device", "cuda", "--shapes", "64x128", "--blocks", "16", "--tokens", "64", "--rounds", "2", "--peers"]
    assert main(["bench", "kernels", *flags, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["dtype"] == "bfloat16" and document["machine"]["gpu"] and document["roofs"]["gigabytes"] > 0
    assert document["rows"][0]["speedup"] > 0
