"""The page's text, the figures, and the command; the drawn page is in test_page.py."""

import json
import re
import sys
from pathlib import Path

import pytest

from regrow.cli import main
from regrow.errors import RegrowError
from regrow.study.figures import write_figures
from regrow.study.report import MAX_POINTS, as_script_data, render, report_data, write_claims, write_report
from regrow.study.runs import Run
from study import synthetic

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028"


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [Run(record) for record in synthetic.study(seeds=2)]


def data_of(page: str) -> dict:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_the_page_holds_everything_and_refers_to_nothing(runs: list[Run]) -> None:
    page = render(report_data(runs, title="A title", notes=["a note"]))
    assert not re.search(r"@@[A-Z_]+@@|https?://(?!www\.w3\.org/2000/svg)|<link|src=", page)
    data = data_of(page)
    assert data["title"] == "A title" and data["notes"] == ["a note"]
    assert len(data["runs"]) == len(runs) and data["families"][0] == "dense"
    assert {run["group"] for run in data["runs"]} == set(range(len(data["groups"])))


def test_text_of_records_cannot_leave_the_data(runs: list[Run]) -> None:
    hostile = synthetic.record(seed=9)
    hostile |= {"id": HOSTILE, "machine": {HOSTILE: HOSTILE}}
    hostile["config"]["method"] = hostile["config"]["size"] = HOSTILE
    page = render(report_data([*runs, Run(hostile)], title=HOSTILE, notes=[HOSTILE]))
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert data_of(page)["title"] == HOSTILE


def test_placeholders_in_records_stay_what_they_are() -> None:
    page = render(report_data([Run(synthetic.record() | {"id": "@@SCRIPT@@ @@DATA@@"})]))
    assert data_of(page)["runs"][0]["id"] == "@@SCRIPT@@ @@DATA@@"


def test_numbers_that_are_none_become_null() -> None:
    assert as_script_data([float("nan"), float("-inf"), 1.5]) == "[null,null,1.5]"


def test_long_curves_are_thinned_to_their_ends() -> None:
    record = synthetic.record()
    record["curve"] = [{"step": i, "mlm_loss": 1.0} for i in range(5000)]
    [run] = report_data([Run(record)])["runs"]
    steps = run["curve"]["step"]
    assert len(steps) == MAX_POINTS and (steps[0], steps[-1]) == (0, 4999) and steps == sorted(set(steps))


def test_labels_name_what_differs_and_no_more() -> None:
    found = [Run(synthetic.record(n_updates=n, learning_rate=1e-3)) for n in (10, 20)]
    found.append(Run(synthetic.record(block_size=16)))
    labels = [group["label"] for group in report_data(found)["groups"]]
    assert labels == [
        "tiny dynsparse b=1 d=0.1 n_updates=10",
        "tiny dynsparse b=1 d=0.1 n_updates=20",
        "tiny dynsparse b=16 d=0.1",
    ]


def test_tasks_have_frontiers_of_their_own() -> None:
    found = [Run(synthetic.record(dense=True, data=data)) for data in ("a", "b")]
    data = report_data(found)
    assert data["tasks"] == ["data a", "data b"]
    assert [group["frontier"]["flops"] for group in data["groups"]] == [True, True]


def test_no_runs_and_no_place_are_refused(tmp_path: Path, runs: list[Run]) -> None:
    with pytest.raises(RegrowError, match="at least one run"):
        report_data([])
    (tmp_path / "file").write_text("")
    with pytest.raises(RegrowError, match="cannot write"):
        write_report(runs, tmp_path / "file" / "report.html")


def test_figures_are_png_and_svg_and_the_same_each_time(tmp_path: Path, runs: list[Run]) -> None:
    pytest.importorskip("matplotlib")
    few = [run for run in runs if run.seed == 0][:8]
    first = write_figures(few, tmp_path / "a")
    told = [claim["id"].lower() for claim in report_data(few)["claims"] if claim["rows"]]
    drawn = ["pareto", "curves", "topology", "patterns", *told]
    assert {path.name for path in first} == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert {"c1", "c7"} <= set(told)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in first if path.suffix == ".png")
    again = write_figures(few, tmp_path / "b")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, again, strict=True))


def test_claims_are_a_page_of_tables(tmp_path: Path, runs: list[Run]) -> None:
    page = write_claims(runs, tmp_path / "deep" / "claims.md").read_text()
    assert [f"## C{i}: " in page for i in range(1, 12)] == [True] * 11
    assert "## C1: supported\n" in page and "Missing: acdc with --dense-until" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "None" not in page
    with pytest.raises(RegrowError, match=r"cannot write .*; choose another --claims"):
        write_claims(runs, tmp_path)


def test_figures_of_a_record_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_figures([Run({"id": "a", "format": 1, "config": {}})], tmp_path)
    assert {path.stem for path in written} == {"pareto", "curves"}


def test_figures_without_matplotlib_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RegrowError, match=r"regrow\[plot\]"):
        write_figures([Run(synthetic.record())], tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = synthetic.write([synthetic.record(dense=True), synthetic.record()], tmp_path / "runs")
    (folder / "torn.json").write_text("{")
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html"), "--title", "Two runs"]) == 0
    assert capsys.readouterr().out == f"2 runs: {tmp_path / 'page.html'}\n"
    data = data_of((tmp_path / "page.html").read_text())
    assert data["title"] == "Two runs" and "torn.json" in data["notes"][0]
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
