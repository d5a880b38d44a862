"""From a corpus to pre-training examples: documents, sentences, token ids, sentence pairs, masks.

:func:`prepare_splits` does once what does not change between runs, up to the sentence pairs, and keeps the
result as memory-mapped Arrow files; :class:`~regrow.bert.stream.PairDataset` reads them. Everything random is a
pure function of a seed and of *what* is drawn (split, document): never of how many processes took part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from regrow.bert.corpus import corpus_fingerprint, read_documents
from regrow.bert.masking import WholeWordMasker
from regrow.bert.pairs import Sentences, StoredDocuments, pairs_from_document
from regrow.bert.stream import PairDataset
from regrow.bert.tokenizer import encode_documents, tokenizer_fingerprint
from regrow.cache import cache_root, written_aside
from regrow.errors import RegrowError

_FORMAT_VERSION = 1
_SMALL_CORPUS = 16 * 2**20  # bytes of text below which starting processes costs more than it gains

_SPLIT, _PAIRS = 1, 2  # first word of every seed: what is drawn (the stream uses 3 and 4)

_DOCUMENTS = datasets.Features({"paragraphs": datasets.List(datasets.Value("string"))})
_ENCODED = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "ends": datasets.List(datasets.Value("int32")),
        "n_tokens": datasets.Value("int64"),
        "n_sentences": datasets.Value("int64"),
    }
)
_EXAMPLES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "boundary": datasets.Value("int32"),
        "is_random": datasets.Value("int8"),
    }
)


@dataclass(frozen=True)
class PretrainingSplits:
    """The result of :func:`prepare_splits`: no document has pairs in both splits.

    Attributes:
        train: one epoch; take :meth:`PairDataset.stream` for longer.
        heldout: an :meth:`PairDataset.evaluation` view.
        n_documents: documents used, in both splits; `n_skipped`: those with fewer than two sentences.
        n_tokens: word pieces of the documents used, without special tokens.
    """

    train: PairDataset
    heldout: PairDataset
    n_documents: int
    n_skipped: int
    n_tokens: int


@dataclass(frozen=True)
class _Recipe:
    """All that decides the stored pairs, besides the content of the corpus and the tokenizer."""

    source: str
    text_field: str
    max_documents: int | None
    short_documents: str
    heldout_fraction: float
    max_length: int
    duplicates: int
    seed: int

    def check(self) -> None:
        if self.short_documents not in ("skip", "error"):
            raise RegrowError(f"short_documents={self.short_documents!r}: it is either 'skip' or 'error'")
        if not 0 <= self.heldout_fraction < 1:
            raise RegrowError(f"heldout_fraction={self.heldout_fraction}: a share in [0, 1) is needed")
        least = {"max_length": 5, "duplicates": 1, "seed": 0, "max_documents": 2}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise RegrowError(f"{name}={value}: it must be at least {minimum}")

    def key(self, tokenizer: PreTrainedTokenizerBase) -> str:
        parts = asdict(replace(self, source=corpus_fingerprint(self.source)))
        parts |= {"tokenizer": tokenizer_fingerprint(tokenizer), "format": _FORMAT_VERSION}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def prepare_splits(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    heldout_fraction: float = 0.02,
    short_documents: str = "skip",
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    max_documents: int | None = None,
    duplicates: int = 1,
    text_field: str = "text",
    masker: WholeWordMasker | None = None,
) -> PretrainingSplits:
    """Turn a corpus into a training and a held-out set of sentence pairs, or load those made before.

    The result is kept in `cache_dir` under a hash of the corpus, the tokenizer and every argument that
    matters; an interrupted preparation leaves nothing that could be taken for a result.

    Args:
        source: see :func:`regrow.bert.corpus.read_documents`, also for `text_field`.
        tokenizer: a BERT tokenizer.
        max_length: tokens of the longest example, special tokens included.
        heldout_fraction: share of the documents to hold out; at least one is (two, if there are four or more,
            so that a random second segment can come from another document).
        short_documents: documents of fewer than two sentences are counted and left out (``"skip"``) or are an
            error (``"error"``).
        seed: of the split, the pairs, and, unless a stream says otherwise, of order and masks.
        num_proc: processes (default: one per CPU, or one if the corpus is small); no effect on the result.
        cache_dir: default ``$REGROW_CACHE``, or ``~/.cache/regrow``.
        max_documents: read no more than the first so many.
        duplicates: how many times each training document is cut into pairs, each time differently.
        masker: default ``WholeWordMasker(tokenizer)``; it can change without preparing again.

    Raises:
        RegrowError: the corpus cannot be read, an argument is out of range, or fewer than two documents have
            two sentences.

    >>> import pathlib, tempfile
    >>> from regrow.bert.tokenizer import train_wordpiece
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> text = "The cat sat. It purred. It slept.\\n\\nA dog ran. It barked.\\n\\nNothing.\\n"
    >>> _ = (folder / "pets.txt").write_text(text)
    >>> datasets.disable_progress_bars()
    >>> tokenizer = train_wordpiece([text], vocab_size=80)
    >>> splits = prepare_splits(str(folder), tokenizer, max_length=16, cache_dir=folder / "cache")
    >>> datasets.enable_progress_bars()
    >>> splits.n_documents, splits.n_skipped
    (2, 1)
    >>> stream = splits.train.stream(1000)
    >>> batch = stream.collate([stream[998], stream[999]])
    >>> sorted(batch), tuple(batch["input_ids"].shape)
    (['attention_mask', 'input_ids', 'labels', 'next_sentence_label', 'token_type_ids'], (2, 16))
    """
    recipe = _Recipe(source, text_field, max_documents, short_documents, heldout_fraction, max_length, duplicates, seed)
    recipe.check()
    masker = masker or WholeWordMasker(tokenizer)
    folder = cache_root(cache_dir) / f"pairs-{recipe.key(tokenizer)}"
    if not folder.exists():
        _build(folder, recipe, tokenizer, num_proc)
    options: dict[str, Any] = {"max_length": max_length, "pad_id": tokenizer.pad_token_id or 0, "seed": seed}
    try:
        counts = json.loads((folder / "counts.json").read_text())
        parts = [datasets.load_from_disk(str(folder / name)) for name in ("train", "heldout")]
    except (OSError, ValueError) as error:
        raise RegrowError(f"cached pairs in {folder} cannot be read ({error}): delete that folder") from error
    train, heldout = (PairDataset(part, masker, **options) for part in parts)
    return PretrainingSplits(train, heldout.evaluation(), **counts)


def _build(folder: Path, recipe: _Recipe, tokenizer: PreTrainedTokenizerBase, num_proc: int | None) -> None:
    """Prepare aside, then move into place; another process that does the same may win the race."""
    with written_aside(folder) as aside, _no_threads_in_tokenizers():
        raw = _read(recipe, aside)
        processes = num_proc or (1 if raw.data.nbytes < _SMALL_CORPUS else os.cpu_count() or 1)
        encoded = _map(raw, _encode_batch, _ENCODED, aside / "encoded.arrow", processes, tokenizer=tokenizer)
        n_tokens, n_sentences = (encoded.data.column(name).to_numpy() for name in ("n_tokens", "n_sentences"))
        usable = np.flatnonzero(n_sentences >= 2)
        _check_usable(raw, usable, recipe)
        for name, rows in _split(usable, recipe).items():
            numbers = datasets.Dataset.from_dict({"number": np.arange(len(rows))})
            pairs = _map(
                numbers,
                _pair_batch,
                _EXAMPLES,
                aside / f"{name}.arrow",
                processes,
                documents=StoredDocuments(encoded, rows),
                recipe=recipe if name == "train" else replace(recipe, duplicates=1),
                ends=(tokenizer.cls_token_id, tokenizer.sep_token_id),
            )
            pairs.save_to_disk(str(aside / folder.name / name))
        counts = {
            "n_documents": len(usable),
            "n_skipped": len(raw) - len(usable),
            "n_tokens": int(n_tokens[usable].sum()),
        }
        (aside / folder.name / "counts.json").write_text(json.dumps(counts))


def _read(recipe: _Recipe, aside: Path) -> datasets.Dataset:
    """The corpus as one row of paragraphs per document, streamed to disk."""
    options = {"source": recipe.source, "text_field": recipe.text_field, "limit": recipe.max_documents}
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=_DOCUMENTS,
            cache_dir=str(aside),
            gen_kwargs=options,
            fingerprint=aside.name.rpartition("-")[2],
        )
    except Exception as error:
        # `datasets` wraps whatever happens in a generator; the reader's own message is the one that helps.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RegrowError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


def _rows(source: str, text_field: str, limit: int | None) -> Iterator[dict[str, list[str]]]:
    for document in islice(read_documents(source, text_field=text_field), limit):
        yield {"paragraphs": document}


def _map(
    rows: datasets.Dataset,
    function: Callable[..., dict[str, Any]],
    features: datasets.Features,
    file: Path,
    processes: int,
    **options: Any,
) -> datasets.Dataset:
    return rows.map(
        function,
        batched=True,
        batch_size=200,
        num_proc=min(processes, len(rows)) if processes > 1 else None,
        remove_columns=rows.column_names,
        features=features,
        fn_kwargs=options,
        cache_file_name=str(file),
        load_from_cache_file=False,
        new_fingerprint=file.stem,  # the default is a hash of everything handed over, which takes a while
        desc=f"Preparing {file.stem}",
    )


def _encode_batch(batch: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    encoded = encode_documents(tokenizer, batch["paragraphs"])
    return {
        "ids": [ids for ids, _ in encoded],
        "ends": [ends for _, ends in encoded],
        "n_tokens": [len(ids) for ids, _ in encoded],
        "n_sentences": [len(ends) for _, ends in encoded],
    }


def _check_usable(raw: datasets.Dataset, usable: np.ndarray, recipe: _Recipe) -> None:
    if recipe.short_documents == "error" and len(usable) < len(raw):
        number = int(np.setdiff1d(np.arange(len(raw)), usable, assume_unique=True)[0])
        start = raw[number]["paragraphs"][0][:60]
        raise RegrowError(
            f"document {number + 1} of corpus {recipe.source!r} has fewer than two sentences ({start!r}...): "
            'remove it, join it to another, or leave such documents out with short_documents="skip"'
        )
    if len(usable) < 2:
        raise RegrowError(
            f"corpus {recipe.source!r}: {len(usable)} of {len(raw)} documents have two sentences or more; at least two "
            "must, one to train on and one to hold out (in a .txt a blank line separates documents)"
        )


def _split(usable: np.ndarray, recipe: _Recipe) -> dict[str, np.ndarray]:
    """Which documents, as rows of the corpus in ascending order, belong to which split."""
    shuffled = np.random.default_rng((_SPLIT, recipe.seed)).permutation(usable)
    least = 2 if len(usable) >= 4 else 1
    n_heldout = min(len(usable) - 1, max(least, round(recipe.heldout_fraction * len(usable))))
    return {"train": np.sort(shuffled[n_heldout:]), "heldout": np.sort(shuffled[:n_heldout])}


def _pair_batch(
    batch: dict[str, Any], documents: StoredDocuments, recipe: _Recipe, ends: tuple[int, int]
) -> dict[str, list[Any]]:
    cls, sep = ends
    result: dict[str, list[Any]] = {name: [] for name in _EXAMPLES}

    def sample_other(rng: np.random.Generator) -> tuple[int, Sentences]:
        number = int(rng.integers(len(documents)))
        return number, documents[number]

    for number in batch["number"]:
        for duplicate in range(recipe.duplicates):
            rng = np.random.default_rng((_PAIRS, recipe.seed, int(documents.rows[number]), duplicate))
            for pair in pairs_from_document(documents[number], number, sample_other, rng, recipe.max_length - 3):
                tokens = [cls, *pair.first, sep, *pair.second, sep]
                result["tokens"].append(np.array(tokens, dtype=np.int32))
                result["boundary"].append(len(pair.first) + 2)
                result["is_random"].append(int(pair.is_random))
    return result


@contextmanager
def _no_threads_in_tokenizers() -> Iterator[None]:
    """Processes do the work in parallel; threads beside them would only complain of the forks."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
