"""The assembly: splits, cache, purity of the stream, and batches."""

import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import regrow.bert.data as module
from regrow.bert.data import prepare_splits
from regrow.bert.masking import IGNORE, WholeWordMasker
from regrow.bert.stream import PairDataset
from regrow.bert.tokenizer import load_tokenizer, train_wordpiece
from regrow.errors import RegrowError

SHARED = Path(__file__).parents[2] / "../shared/data"
WORDS = ["harbour", "ship", "captain", "storm", "island", "letter", "winter", "garden", "river", "stone", "music"]
N_DOCUMENTS = 60


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents whose every sentence names its document: which is how the tests tell them apart."""
    rng = np.random.default_rng(0)
    documents = []
    for number in range(N_DOCUMENTS):
        sentences = [
            f"Story {number} has {' '.join(rng.choice(WORDS, rng.integers(3, 12)))}."
            for _ in range(rng.integers(4, 12))
        ]
        half = len(sentences) // 2
        documents.append(" ".join(sentences[:half]) + "\n" + " ".join(sentences[half:]))
    documents.insert(7, "Only one sentence here.")
    path = tmp_path_factory.mktemp("corpus") / "stories.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    # Large enough that every word and every number of two digits is one piece.
    numbers = [str(number) for number in range(N_DOCUMENTS)] * 20
    return train_wordpiece([*Path(corpus).read_text().splitlines(), *numbers], vocab_size=500)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def splits(corpus, tokenizer, cache):
    return prepare_splits(corpus, tokenizer, max_length=48, heldout_fraction=0.1, cache_dir=cache)


def rows(pairs):
    return [(row["tokens"], row["boundary"], row["is_random"]) for row in pairs.with_format(None)]


def documents_of(tokens, tokenizer):
    """The numbers after the word "story" in a list of ids: where they come from."""
    text = tokenizer.decode(tokens).split()
    return {text[i + 1] for i, word in enumerate(text[:-1]) if word == "story" and text[i + 1].isdigit()}


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_counts(splits, tokenizer, corpus):
    assert splits.n_documents == N_DOCUMENTS
    assert splits.n_skipped == 1
    text = Path(corpus).read_text().replace("Only one sentence here.", "")
    assert splits.n_tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_stored_pairs_have_the_layout_of_bert(splits, tokenizer):
    for tokens, boundary, is_random in rows(splits.train.pairs) + rows(splits.heldout.pairs):
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        assert len(tokens) <= 48
        assert tokens[0] == cls
        assert [i for i, token in enumerate(tokens) if token == sep] == [boundary - 1, len(tokens) - 1]
        first = documents_of(tokens[:boundary], tokenizer)
        second = documents_of(tokens[boundary:], tokenizer)
        assert len(first) <= 1
        assert len(second) <= 1
        if first and second:
            assert (first != second) == bool(is_random)


def test_splits_share_no_document(splits, tokenizer):
    train, heldout = (
        set().union(*(documents_of(tokens, tokenizer) for tokens, _, _ in rows(part.pairs)))
        for part in (splits.train, splits.heldout)
    )
    assert not train & heldout
    assert len(heldout) == 6
    assert len(train) == N_DOCUMENTS - 6


def test_random_share(splits):
    shares = [is_random for _, _, is_random in rows(splits.train.pairs)]
    # Always random when a chunk is one sentence, as at the end of a document: so somewhat above one half.
    assert 0.4 < np.mean(shares) < 0.75


def test_second_call_reads_the_cache(splits, corpus, tokenizer, cache, monkeypatch):
    def not_again(*_):
        raise AssertionError("prepared again")

    monkeypatch.setattr(module, "_build", not_again)
    options = {"max_length": 48, "heldout_fraction": 0.1, "cache_dir": cache}
    again = prepare_splits(corpus, tokenizer, **options)
    assert (again.n_documents, again.n_skipped, again.n_tokens) == (60, 1, splits.n_tokens)
    assert rows(again.train.pairs) == rows(splits.train.pairs)
    for change in ({"seed": 1}, {"max_length": 40}, {"duplicates": 2}, {"max_documents": 50}):
        with pytest.raises(AssertionError, match="prepared again"):
            prepare_splits(corpus, tokenizer, **(options | change))


def test_cache_of_the_environment(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "here"))
    prepare_splits(corpus, tokenizer, max_documents=5)
    assert [path.name[:6] for path in (tmp_path / "here").iterdir()] == ["pairs-"]


def test_number_of_processes_does_not_matter(splits, corpus, tokenizer, tmp_path, capfd):
    parallel = prepare_splits(corpus, tokenizer, max_length=48, heldout_fraction=0.1, cache_dir=tmp_path, num_proc=2)
    assert rows(parallel.train.pairs) == rows(splits.train.pairs)
    assert rows(parallel.heldout.pairs) == rows(splits.heldout.pairs)
    assert "parallelism" not in capfd.readouterr().err


def test_interrupted_preparation_leaves_no_cache(splits, corpus, tokenizer, tmp_path, monkeypatch):
    options = {"max_length": 48, "heldout_fraction": 0.1, "cache_dir": tmp_path}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_split", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_splits(corpus, tokenizer, **options)
    assert not list(tmp_path.iterdir())

    # A killed process cannot clean up: what it leaves must not be taken for a result.
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(module, "_split", killed)
        patch.setattr("regrow.cache.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            prepare_splits(corpus, tokenizer, **options)
    assert len(list(tmp_path.iterdir())) == 1
    assert rows(prepare_splits(corpus, tokenizer, **options).train.pairs) == rows(splits.train.pairs)


def test_damaged_cache_is_named(corpus, tokenizer, tmp_path):
    prepare_splits(corpus, tokenizer, max_documents=5, cache_dir=tmp_path)
    [folder] = tmp_path.iterdir()
    (folder / "counts.json").write_text("")
    with pytest.raises(RegrowError, match="delete that folder"):
        prepare_splits(corpus, tokenizer, max_documents=5, cache_dir=tmp_path)


def test_items_depend_on_seed_and_index_alone(splits, corpus, tokenizer, cache):
    n = len(splits.train)
    stream = splits.train.stream(3 * n)
    fresh = prepare_splits(corpus, tokenizer, max_length=48, heldout_fraction=0.1, cache_dir=cache)
    for index in (2 * n + 3, 5, n, 3 * n - 1):  # out of order, across epochs
        assert same(fresh.train.stream(3 * n)[index], stream[index])
    assert same(splits.train.stream(n + 2)[n + 1], stream[n + 1])
    assert not any(same(stream[i], splits.train.stream(n, seed=1)[i]) for i in range(20))
    with pytest.raises(IndexError):
        stream[3 * n]
    assert len(list(splits.train.stream(7))) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_do_not_matter(splits, workers):
    stream = splits.train.stream(len(splits.train) + 40)
    loader = DataLoader(stream, batch_size=16, num_workers=workers, collate_fn=stream.collate)
    for number, batch in enumerate(loader):
        indices = range(16 * number, min(16 * number + 16, len(stream)))
        expected = stream.collate([stream[i] for i in indices])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_every_epoch_has_every_pair_once_in_another_order(splits):
    n = len(splits.train)
    stream = splits.train.stream(2 * n)
    epochs = []
    for epoch in range(2):
        originals = []
        for i in range(epoch * n, (epoch + 1) * n):
            item = stream[i]
            originals.append(tuple(np.where(item["labels"] == IGNORE, item["input_ids"], item["labels"])))
        epochs.append(originals)
    stored = sorted(tuple(tokens) for tokens, _, _ in rows(splits.train.pairs))
    assert sorted(epochs[0]) == sorted(epochs[1]) == stored
    assert epochs[0] != epochs[1]


def test_masks_change_between_epochs_but_not_in_evaluation(splits):
    heldout = splits.heldout
    assert len(heldout) == len(heldout.pairs)
    assert all(same(heldout[i], heldout.evaluation()[i]) for i in range(len(heldout)))
    for i, (tokens, boundary, is_random) in enumerate(rows(heldout.pairs)):
        item = heldout[i]
        assert np.where(item["labels"] == IGNORE, item["input_ids"], item["labels"]).tolist() == tokens
        assert item["token_type_ids"].tolist() == [0] * boundary + [1] * (len(tokens) - boundary)
        assert item["next_sentence_label"] == is_random
    view = PairDataset(heldout.pairs, heldout.masker, length=2 * len(heldout), shuffle=False)
    assert not all(same(view[i], view[i + len(heldout)]) for i in range(len(heldout)))


def test_pickled_data_set_is_small_and_the_same(splits):
    stream = splits.train.stream(100)
    first = stream[0]
    stored = pickle.dumps(stream)
    assert len(stored) < 20_000
    assert same(pickle.loads(stored)[0], first)


def test_collate(splits, tokenizer):
    train = splits.train
    items = [train[i] for i in range(5)]
    batch = train.collate(items)
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        **dict.fromkeys(["input_ids", "attention_mask", "token_type_ids", "labels"], (5, 48)),
        "next_sentence_label": (5,),
    }
    assert {t.dtype for t in batch.values()} == {torch.int64}
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (48 - length)
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        assert batch["input_ids"][row, :length].tolist() == item["input_ids"].tolist()
    assert train.collate(items, pad_to=64)["labels"].shape == (5, 64)
    with pytest.raises(RegrowError, match="does not fit pad_to=4"):
        train.collate(items, pad_to=4)


def test_model_takes_a_batch(splits, tokenizer):
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    loss = BertForPreTraining(config)(**splits.train.collate([splits.train[0], splits.train[1]])).loss
    assert torch.isfinite(loss)


def test_duplicates_are_cut_differently(corpus, tokenizer, splits, tmp_path):
    twice = prepare_splits(corpus, tokenizer, max_length=48, heldout_fraction=0.1, cache_dir=tmp_path, duplicates=2)
    once, both = rows(splits.train.pairs), rows(twice.train.pairs)
    assert [row for row in both if row in once][:3] == once[:3]
    assert 1.5 < len(both) / len(once) < 2.5
    assert both != once + once
    assert rows(twice.heldout.pairs) == rows(splits.heldout.pairs)


def test_other_masker_needs_no_new_preparation(splits, corpus, tokenizer, cache):
    masker = WholeWordMasker(tokenizer, max_predictions=1, whole_word=False)
    before = set(os.listdir(cache))
    other = prepare_splits(corpus, tokenizer, max_length=48, heldout_fraction=0.1, cache_dir=cache, masker=masker)
    assert set(os.listdir(cache)) == before
    assert all((other.train[i]["labels"] != IGNORE).sum() == 1 for i in range(10))


def test_short_documents_as_errors(corpus, tokenizer, tmp_path):
    message = r"document 8 of corpus .* fewer than two sentences \('Only one sentence here\.'.*short_documents"
    with pytest.raises(RegrowError, match=message):
        prepare_splits(corpus, tokenizer, short_documents="error", cache_dir=tmp_path)
    splits = prepare_splits(corpus, tokenizer, short_documents="error", cache_dir=tmp_path, max_documents=7)
    assert splits.n_skipped == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Just one.\n\nAnd another.\n", "0 of 2 documents have two sentences or more"),
        ("Just one. But two sentences.\n\nAnd another.\n", "1 of 2 documents have"),
        ("\n", "holds no text"),
    ],
)
def test_too_little_text(text, message, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(RegrowError, match=message) as caught:
        prepare_splits(str(tmp_path / "a.txt"), tokenizer, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_two_documents_are_enough(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A ship. A storm.\n\nA horse. A river.\n")
    splits = prepare_splits(str(tmp_path / "a.txt"), tokenizer, cache_dir=tmp_path / "cache")
    assert len(splits.train) > 0
    assert len(splits.heldout) > 0


def test_reading_errors_come_through(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Good. Text.\n\n\xff\n")
    with pytest.raises(RegrowError, match="line 3: not UTF-8"):
        prepare_splits(str(tmp_path / "a.txt"), tokenizer, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"short_documents": "keep"}, "short_documents='keep'"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction=1\.0"),
        ({"max_length": 4}, "max_length=4: it must be at least 5"),
        ({"duplicates": 0}, "duplicates=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(option, message, corpus, tokenizer, tmp_path):
    with pytest.raises(RegrowError, match=message):
        prepare_splits(corpus, tokenizer, cache_dir=tmp_path, **option)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the Wikipedia corpus beside the project")
def test_wikipedia_sample(tmp_path):
    tokenizer = load_tokenizer(SHARED / "vocab/bert-base-uncased-vocab.txt")
    source = str(SHARED / "wikipedia/train.txt.xz")
    splits = prepare_splits(source, tokenizer, max_documents=100, cache_dir=tmp_path)
    assert splits.n_documents + splits.n_skipped == 100
    labels = np.array([is_random for _, _, is_random in rows(splits.train.pairs)])
    assert 0.45 < labels.mean() < 0.6
    unknown = np.mean([i for tokens, _, _ in rows(splits.train.pairs) for i in np.array(tokens) == 100])
    assert unknown < 0.005
