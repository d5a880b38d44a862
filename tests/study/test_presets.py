"""The studies that come with regrow, and reading a user's own."""

import re
from pathlib import Path

import pytest
import yaml

from regrow import RegrowError
from regrow.cli import main
from regrow.study import available_studies, load_study
from regrow.study.presets import SCALES

PRESETS = [f"c{i}" for i in range(1, 12)]


def test_there_is_one_for_every_claim() -> None:
    assert available_studies() == PRESETS


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_run_at_every_scale(name: str, scale: str) -> None:
    study = load_study(name, scale)
    assert study.claim and study.figure and len(study.runs()) >= 2
    labels = list(study.labels().values())
    assert len(labels) == len(set(labels))
    for run in study.runs():
        assert run.config.schedule.n_updates <= run.config.steps
        if scale == "paper":
            assert run.config.steps == 757_000 and run.config.lr_scope == "all" and not run.config.block_steps


def test_claims_share_runs() -> None:
    def ids(name: str) -> set[str]:
        return {run.id for run in load_study(name, "cpu").runs()}

    assert ids("c4") < ids("c3")
    for name in ("c2", "c3", "c7", "c9"):
        assert ids("c1") & ids(name), name
    assert len(set().union(*map(ids, PRESETS)) - ids("c8")) < 120  # what a night on two cores can do


def test_the_list_names_them_all(capsys: pytest.CaptureFixture) -> None:
    assert main(["study", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in available_studies())
    assert "cpu gpu paper" in shown


def test_show_prints_runs_with_ids(capsys: pytest.CaptureFixture) -> None:
    assert main(["study", "show", "c9", "--scale", "paper"]) == 0
    shown = capsys.readouterr().out
    assert "method=rigl" in shown and load_study("c9", "paper").runs()[0].id[:10] in shown and "2 runs" in shown


def write(path: Path, document: object) -> str:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "defaults: {size: 2/64, learning_rate: 1e-3}\nexperiments:\n- {seeds: 2}\n")
    study = load_study(path)
    assert (study.name, study.scale, len(study.runs())) == ("mine", "custom", 2)
    assert study.runs()[0].config.learning_rate == 1e-3  # which YAML takes for text
    scaled = {"experiments": [{"seeds": 2}], "scales": {"night": {"defaults": {"steps": 7}}, "cpu": None}}
    path = write(tmp_path / "scaled.yaml", scaled)
    assert {run.config.steps for run in load_study(path).runs()} == {7}
    assert load_study(path, "cpu").runs()[0].config.vocab_size == 2048


def test_the_studies_of_the_documentation_are_what_it_says(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/studies.md"
    if not page.exists():
        pytest.skip("the documentation is not beside the tests")
    mine, scaled = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    runs = load_study(write(tmp_path / "mine.yaml", mine)).runs()
    assert [sum(run.config.dense is dense for run in runs) for dense in (False, True)] == [12, 6]
    path = write(tmp_path / "scaled.yaml", scaled)
    assert [len(load_study(path, scale).runs()) for scale in ("cpu", "gpu")] == [2, 6]


@pytest.mark.parametrize(
    ("document", "scale", "message"),
    [
        ({"experiment": []}, None, "unknown entry 'experiment'; a study has name, claim"),
        ({"experiments": {}}, None, "'experiments' must be a list"),
        ({"experiments": [3]}, None, "experiment 1 must be a mapping"),
        ({"defaults": []}, None, "'defaults' must be a mapping"),
        ({"scales": {"cpu": {"runs": 1}}}, None, "scale cpu: unknown entry 'runs'"),
        ({"scales": {"cpu": 3}}, None, "scale cpu: must hold"),
        ({"scales": {"cpu": {}}}, "gpu", "has no scale 'gpu'; it has cpu"),
        ({"scales": {}}, None, "has no scale"),
        ({}, "cpu", "has no scales"),
        ("a: [", None, "not valid YAML"),
    ],
)
def test_files_that_are_no_study(tmp_path: Path, document: object, scale: str | None, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        load_study(write(tmp_path / "study.yaml", document), scale)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "c99"], "unknown study 'c99'; choose one of c1, c2"),
        (["show", "none.yaml"], "cannot read none.yaml"),
        (["run", "c5", "--dry-run", "--set", "steps"], "'steps' must be NAME=VALUE"),
        (["run", "c5", "--dry-run", "--set", "stepz=1"], "unknown option 'stepz'"),
        (["run", "c5", "--dry-run", "--only", "zzz"], "no run of study 'c5' matches 'zzz'"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["study", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("regrow study: error: ") and message in line
