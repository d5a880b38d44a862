"""Identity: the same training has the same id however it is asked for, another has another."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow import RegrowError
from regrow.bert.pretrain import PretrainConfig
from regrow.study import RunSpec, Study
from regrow.study.spec import NO_EFFECT, expand

BASE = {"size": "2/64", "steps": 400, "method": "dynsparse", "norm": "l2", "learning_rate": 1e-3, "seed": 3}


@given(st.permutations(list(BASE)))
def test_the_order_of_options_does_not_matter(names: list[str]) -> None:
    assert RunSpec({name: BASE[name] for name in names}).id == RunSpec(BASE).id


def test_defaults_spelled_out_or_not_are_the_same_run() -> None:
    spec = RunSpec(BASE)
    assert RunSpec(spec.full) == spec
    assert dict(RunSpec(spec.full).options) == dict(spec.options) == {k: BASE[k] for k in sorted(BASE) if k != "method"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"size": "tiny", "learning_rate": 1e-3}, {"size": "2/128/2", "learning_rate": 0.001}),
        ({"steps": 400}, {"steps": 400, "n_updates": 8, "eval_steps": 400, "dropout": 0.0}),
        ({"dense": True}, {"dense": True, "density": 0.5, "method": "rigl", "block_size": 4, "n_updates": 3}),
        ({"method": "static"}, {"method": "static", "n_updates": 3, "drop_fraction": 0.1, "decay": "linear"}),
        ({"learning_rate": 1e-3}, {"learning_rate": "1e-3", "lr_rule": "inverse", "lr_scope": "all", "lr_scale": 2}),
        ({}, dict.fromkeys(("workers", "keep_checkpoints"), 3) | {"logging_steps": 1, "save_steps": 7}),
        ({"learning_rate": 1}, {"learning_rate": 1.0}),
    ],
)
def test_what_changes_nothing_is_no_other_run(one: dict, other: dict) -> None:
    assert RunSpec(one) == RunSpec(other) and hash(RunSpec(one)) == hash(RunSpec(other))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"density": 0.2}, {"block_size": 4}, {"steps": 401}, {"norm": "l1"}, {"method": "static"},
        {"dense": True}, {"learning_rate": 2e-3}, {"size": "2/128"}, {"n_updates": 9}, {"lr_rule": "supar"},
        {"weight_decay": 0.0}, {"eval_steps": 100}, {"max_documents": 5}, {"block_steps": False},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_something_is_another_run(change: dict) -> None:
    options = {k: v for k, v in BASE.items() if not (k == "norm" and "method" in change)} | change
    assert RunSpec(options) != RunSpec(BASE)


def test_the_scale_of_a_rate_counts_where_a_rule_gives_the_rate() -> None:
    assert RunSpec({"lr_scale": 0.5}) != RunSpec({}) and RunSpec({"lr_scale": 0.5, "dense": True}) != RunSpec(
        {"dense": True}
    )


OTHER_TEXT = {"data": "a/hub-set", "size": "2/64", "distribution": "erk", "method": "set", "lr_rule": "inverse",
              "lr_scope": "all", "decay": "linear", "tokenizer": "a/hub-set", "text_field": "body", "fuse": "none",
              "short_documents": "error", "report_to": "none,", "on_nonfinite": "skip", "layer": "lowrank",
              "precision": "bf16"}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(PretrainConfig) if f.name not in (*NO_EFFECT, "base_width")])
def test_every_option_is_part_of_the_identity_unless_it_is_known_not_to_be(name: str) -> None:
    default = getattr(PretrainConfig(), name)
    if name in OTHER_TEXT:
        other = OTHER_TEXT[name]
    elif isinstance(default, bool):
        other = not default
    elif isinstance(default, float) or name in ("learning_rate", "dropout"):
        other = 0.25
    else:
        other = (default or 0) + 64 if name != "block_size" else 4
    changes = {"drop_fraction": 0.5} if name == "final_fraction" else {}
    assert RunSpec({name: other, **changes}) != RunSpec(changes)


def test_an_option_that_a_later_version_adds_makes_no_run_another_one() -> None:
    """Plain defaults are no part of the recipe; those that depend on other options are."""
    names = set(RunSpec({}).recipe())
    assert names == {"format", "size", "dropout", "n_updates", "eval_steps", "data", "tokenizer_format", "dense_lr"}


def test_a_corpus_counts_by_its_content(tmp_path: Path) -> None:
    for name, text in {"a": "One.", "b": "One.", "c": "Two."}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
        (tmp_path / name / "vocab.txt").write_text(text)
    ids = {name: RunSpec({"data": str(tmp_path / name / "text.txt")}).id for name in "abc"}
    assert ids["a"] == ids["b"] != ids["c"]
    ids = {name: RunSpec({"tokenizer": str(tmp_path / name)}).id for name in "abc"}
    assert ids["a"] == ids["b"] != ids["c"]
    with_file = RunSpec({"tokenizer": str(tmp_path / "a/vocab.txt"), "vocab_size": 99})
    assert with_file.id == ids["a"]  # a tokenizer that is given has the size it has


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 1}, "unknown option 'colour'"),
        ({"norm": "l1", "method": "static"}, "unknown option 'norm' of a run with method 'static'"),
        ({"output": "x"}, "unknown option 'output'"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"steps": 1.5}, "'steps' must be a whole number, got 1.5"),
        ({"steps": True}, "'steps' must be a whole number"),
        ({"steps": float("inf")}, "'steps' must be a whole number"),
        ({"dense": 1}, "'dense' must be true or false"),
        ({"density": "much"}, "'density' must be a number, got 'much'"),
        ({"dropout": []}, "'dropout' must be a number or null"),
        ({"norm": "l3"}, "'norm' must be one of 'l1', 'l2', 'linf'"),
        ({"size": "huge"}, "unknown size"),
        ({"density": 0.0}, "density"),
        ({"steps": 4, "n_updates": 9}, "n_updates must lie between"),
    ],
)
def test_options_that_no_run_can_use(options: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        RunSpec(options)


def test_lists_are_axes_and_overrides_win() -> None:
    study = Study(
        "s",
        defaults={"method": "static", "density": [0.1, 0.2], "steps": 50},
        experiments=[{"size": ["2/32", "2/64"], "seeds": [4, 5]}, {"size": "2/128", "steps": 60}],
    )
    runs = [(r.config.size, r.config.density, r.config.seed, r.config.steps) for r in study.runs()]
    assert runs[:3] == [("2/32", 0.1, 4, 50), ("2/32", 0.1, 5, 50), ("2/64", 0.1, 4, 50)]
    assert len(runs) == len(set(runs)) == 10 and runs[-1] == ("2/128", 0.2, 0, 60)
    assert {run.config.steps for run in study.with_options(steps=70).runs()} == {70}
    assert len(list(expand({"a": [], "b": [1, 2]}))) == 0


def test_runs_that_are_asked_for_twice_are_done_once() -> None:
    study = Study("s", experiments=[{"dense": True, "block_size": [1, 16]}, {"dense": True}, {"method": "static"}])
    assert [run.config.dense for run in study.runs()] == [True, False]
    assert list(study.labels().values()) == ["dense", "method=static"] or len(set(study.labels().values())) == 2


def test_labels_name_what_differs_and_are_unique() -> None:
    study = Study(
        "s",
        defaults={"size": "2/64"},
        experiments=[
            {"method": ["static", "dynsparse"], "block_size": [1, 16], "seeds": 2},
            {"dense": True, "seeds": 2},
            {"learning_rate": 1e-3},
        ],
    )
    labels = list(study.labels().values())
    assert len(labels) == len(set(labels)) == 11
    assert "method=dynsparse,block_size=16,seed=1" in labels[7] and labels[8].startswith("seed=0,dense")
    assert [run.config.seed for run in study.only("*method=static*seed=1*")] == [1, 1]
    assert study.only(study.runs()[2].id) == [study.runs()[2]]
    with pytest.raises(RegrowError, match="no run of study 's' matches 'x'"):
        study.only("x")


def test_rates_by_a_factor_of_the_rule() -> None:
    study = Study("s", defaults={"size": "small"}, experiments=[{"density": [0.1, 1.0], "lr_factor": [0.5, "1"]}])
    assert [run.config.learning_rate for run in study.runs()] == [0.00128, 0.00256, 0.0002, 0.0004]
    dense = Study("s", defaults={"size": "small", "lr_factor": 2, "dense": True})
    assert dense.runs()[0].config.learning_rate == 0.0008
    with pytest.raises(RegrowError, match="not both"):
        dense.with_options(learning_rate=1e-3).runs()
