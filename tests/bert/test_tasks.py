"""Tables, tasks and metrics."""

import gzip
from pathlib import Path

import datasets
import numpy as np
import pytest

from regrow import RegrowError
from regrow.bert.tasks.metrics import expected_calibration_error, task_metrics
from regrow.bert.tasks.table import read_table
from regrow.bert.tasks.task import GLUE, read_examples, task_named

DATA = Path(__file__).parents[3] / "shared" / "data" / "glue"
SIZES = {
    "SST-2": ("sst2", 67349, 872),
    "CoLA": ("cola", 8551, 1043),
    "MRPC": ("mrpc", 3667, 408),
    "RTE": ("rte", 2490, 277),
    "STS-B": ("stsb", 5749, 1500),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the GLUE files are not there")
@pytest.mark.parametrize("folder", SIZES)
def test_the_published_files_of_glue_are_read_whole(folder):
    name, n_train, n_dev = SIZES[folder]
    for split, n in (("train", n_train), ("dev", n_dev)):
        task, examples = read_examples(task_named(name), DATA / folder, split)
        assert len(examples) == n and task == GLUE[name]
        assert all(text.strip() for texts in examples.texts for text in texts)
        assert len(set(examples.labels)) == 2 or task.is_regression


@pytest.mark.skipif(not DATA.is_dir(), reason="the GLUE files are not there")
def test_a_split_that_is_not_there_is_named():
    assert len(read_examples(task_named("qnli"), DATA / "QNLI", "dev")[1]) == 5463
    with pytest.raises(RegrowError, match=r"QNLI holds no train file .* name one with --train_data"):
        read_examples(task_named("qnli"), DATA / "QNLI", "train")


def rows(path: Path, text: str, columns=("a", "b"), **options) -> list:
    path.write_text(text)
    return list(read_table(path, columns, **options))


def test_formats(tmp_path):
    place = f"{tmp_path}/t"
    assert rows(tmp_path / "t.tsv", 'b\ta\n"1\tx"y\n\n') == [(f"{place}.tsv, line 2", ['x"y', '"1'])]
    assert rows(tmp_path / "t.csv", 'a,b\n"x\ny",1\nz,"2,3"\n') == [
        (f"{place}.csv, line 2", ["x\ny", "1"]),
        (f"{place}.csv, line 4", ["z", "2,3"]),
    ]
    assert rows(tmp_path / "t.jsonl", '{"a": "x", "b": 1, "c": 2}\n') == [(f"{place}.jsonl, line 1", ["x", 1])]
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfa\tb\n1\t2\n"))
    assert [values for _, values in read_table(tmp_path / "t.tsv.gz", ["a"])] == [["1"]]
    assert rows(tmp_path / "h.tsv", "1\t2\n", header=("a", "b")) == [(f"{tmp_path}/h.tsv, line 1", ["1", "2"])]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", "a\tb\n1\n", "line 2: 1 fields where 2 are expected"),
        ("t.tsv", "a\tc\n1\t2\n", "line 1: no column 'b' among 'a', 'c'"),
        ("t.jsonl", '{"a": 1}\n', "line 1: no column 'b'"),
        ("t.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("t.jsonl", "{a\n", "line 1: not JSON"),
        ("t.txt", "a\n", "no known format"),
    ],
)
def test_bad_tables_are_named(tmp_path, name, text, message):
    with pytest.raises(RegrowError, match=message):
        rows(tmp_path / name, text)


def test_hub_data_bring_their_labels(monkeypatch):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    part = datasets.Dataset.from_dict({"sentence": ["x", "y", "z"], "label": [1, 0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"validation": part})
    task, examples = read_examples(task_named("sst2"), "someone/glue:sst2", "dev")
    assert task.labels == ("negative", "positive")
    assert (examples.texts, examples.labels) == ([("x",), ("y",)], [1, 0])
    with pytest.raises(RegrowError, match="has no train split, only validation"):
        read_examples(task_named("sst2"), "someone/glue:sst2", "train")


def test_scores_taken_for_labels_are_noticed(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"w{i},{i / 7:.3f}\n" for i in range(40)))
    with pytest.raises(RegrowError, match="40 different labels in 40 rows; is it a score"):
        read_examples(task_named("classification"), tmp_path, "train")


def test_a_task_of_glue_has_its_own_columns():
    with pytest.raises(RegrowError, match="not sst2"):
        task_named("sst2", ["text"])
    with pytest.raises(RegrowError, match="one column or two"):
        task_named("classification", ["a", "b", "c"])


def test_metrics_by_hand():
    logits, labels = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), np.array([1, 1, 0, 0])
    found = task_metrics(("accuracy", "f1", "matthews", "macro_f1"), logits, labels)
    assert (found["accuracy"], found["f1"], found["matthews"], found["macro_f1"]) == (0.5, 0.5, 0.0, 0.5)
    scores = task_metrics(("pearson", "spearman", "mse"), np.array([1.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0]))
    assert scores["spearman"] == 1.0 and scores["mse"] == 12.0 and 0.9 < scores["pearson"] < 1.0
    assert task_metrics(("pearson",), np.ones(3), np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0}


def test_calibration_error_is_zero_when_confidence_is_accuracy():
    probabilities = np.tile([0.75, 0.25], (400, 1))
    labels = np.repeat([0, 0, 0, 1], 100)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.0)
    assert expected_calibration_error(probabilities, 1 - labels) == pytest.approx(0.5)
