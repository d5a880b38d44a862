"""Records: there and back, and everything that is none."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow import BlockTopology, RegrowError
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.run import RunDirectory
from regrow.study import RunRecord, load_records
from regrow.study.patterns import occupancy
from regrow.study.record import paper_flops, summarise, thinned, write_json


def record(**changes: Any) -> RunRecord:
    point = {"step": 10, "tokens": 100, "seconds": 0.5, "mlm_loss": 7.5}
    entries = {
        "id": "ab" * 12,
        "spec": {"seed": 1},
        "config": {"seed": 1, "size": "tiny"},
        "machine": {"cores": 2},
        "versions": {"regrow": "0"},
        "flops": {"per_sequence_paper": 1.5e9, "train_paper": 3e12},
        "seconds": 1.25,
        "tokens": 200,
        "memory": {"peak_rss": 10**9},
        "final": {"eval_mlm_loss": 7.0, "eval_nsp_loss": None},
        "curve": [point],
        "evaluations": [{"step": 0, "seconds": 0.0, "eval_mlm_loss": 9.0}],
        "topology": {"updates": [], "layers": {}},
        "patterns": {"layer": [{"step": 0, "shape": [1, 2], "counts": [[1, 0]]}]},
    }
    return RunRecord(**(entries | changes))


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    record().save(path)
    assert RunRecord.load(path) == record()
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]
    document = asdict(record())
    del document["patterns"]  # a dense run has none
    path.write_text(json.dumps(document | {"later": 1}))  # and a newer regrow may know more
    assert RunRecord.load(path) == record(patterns={})


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and json.loads((tmp_path / "a.json").read_text())[
        "x"
    ] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "record format 2, this regrow reads 1"),
        ({"id": None}, "'id' is null"),
        ({"curve": {}}, "'curve' is an object"),
        ({"seconds": "1"}, "'seconds' is text"),
        ({"tokens": True}, "'tokens' is a truth value"),
        ({"flops": {"train_paper": 1.0}}, "'flops' lacks the number 'per_sequence_paper'"),
        ({"final": {"eval_mlm_loss": "7", "eval_nsp_loss": 1}}, "'final' lacks the number 'eval_mlm_loss'"),
        ({"curve": [{"step": 1}]}, "point 0 of 'curve' lacks one of step, tokens, seconds, mlm_loss"),
        ({"evaluations": [3]}, "point 0 of 'evaluations'"),
        ({"topology": {}}, "'topology' lacks"),
    ],
)
def test_what_is_no_record_says_why(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(asdict(record()) | change))
    with pytest.raises(RegrowError, match=f"record.json: .*{message}"):
        RunRecord.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must hold a JSON object, it holds a list"), ("{}", "format None")],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RegrowError, match=message):
        RunRecord.load(tmp_path / "record.json")
    with pytest.raises(RegrowError, match="cannot read"):
        RunRecord.load(tmp_path / "none.json")


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    document = asdict(record())
    del document["machine"]
    (tmp_path / "record.json").write_text(json.dumps(document))
    with pytest.raises(RegrowError, match="lacks 'machine'"):
        RunRecord.load(tmp_path / "record.json")


def test_records_of_files_and_folders(tmp_path: Path) -> None:
    ids = ["aa" * 12, "bb" * 12, "cc" * 12]
    for name, folder in zip(ids, ("one/records", "one/records", "two"), strict=True):
        record(id=name).save(tmp_path / folder / f"{name}.json")
    found = load_records([tmp_path / "one", tmp_path / "two", tmp_path / f"two/{ids[2]}.json"])
    assert [r.id for r in found] == ids
    with pytest.raises(RegrowError, match="no such file"):
        load_records([tmp_path / "three"])


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({"size": "mini", "dense": True}, 2.617e9),
        ({"size": "small", "dense": True}, 10.07e9),
        ({"size": "medium", "density": 0.1}, 2.738e9),
        ({"size": "base", "density": 0.1}, 8.33e9),
        ({"size": "mini", "density": 0.1, "method": "acdc"}, 2.617e9),  # which computes with dense weights
    ],
)
def test_flops_are_the_published_ones(options: dict, published: float) -> None:
    config = PretrainConfig(**options, steps=10, batch_size=4)
    flops = paper_flops(config)
    assert flops["per_sequence_paper"] == pytest.approx(published, rel=0.002)
    assert flops["train_paper"] == 40 * flops["per_sequence_paper"]


def test_a_run_that_diverged_has_no_number(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    totals = {"tokens": 5, "seconds": 0.1}
    run.log_metrics({"step": 10, **totals, "mlm_loss": float("inf")})
    with pytest.raises(RegrowError, match="has not finished"):
        summarise(run)
    run.log_metrics({"step": 10, **totals, "eval_mlm_loss": float("nan"), "eval_nsp_loss": 1.0})
    summary = summarise(run)
    assert summary["final"] == {"eval_mlm_loss": None, "eval_nsp_loss": 1.0}
    assert summary["curve"][0]["mlm_loss"] is None
    record(**summary).save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json").final["eval_mlm_loss"] is None


def test_curves_are_thinned_evenly_with_both_ends() -> None:
    points = thinned(list(range(1001)), most=200)
    assert len(points) == 200 and points[0] == 0 and points[-1] == 1000
    assert {b - a for a, b in pairwise(points)} <= {5, 6}


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (32, 32), (33, 100), (256, 64)])
def test_pictures_count_every_block_once(shape: tuple[int, int]) -> None:
    n = max(1, shape[0] * shape[1] // 3)
    topology = BlockTopology.random(*shape, n, torch.Generator().manual_seed(0))
    counts = torch.tensor(occupancy(topology))
    assert counts.shape == (min(32, shape[0]), min(32, shape[1])) and counts.sum() == n
    if max(shape) <= 32:
        assert counts.max() == 1
        rows, cols = counts.nonzero(as_tuple=True)
        assert torch.equal((rows * shape[1] + cols).sort().values, topology.keys().sort().values.long())
