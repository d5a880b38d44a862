"""WordPiece tokenizers: training one, loading one, and encoding the sentences of a corpus with it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase

from regrow.bert.sentences import split_sentences
from regrow.errors import RegrowError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FORMAT = 2
"""Raised when the same text and arguments come to give another vocabulary, so that caches notice."""


def _most_characters(vocab_size: int) -> int:
    """How many characters a vocabulary knows: each takes two entries, and few of those that are rare ever pay."""
    return min(1000, max(128, vocab_size // 16))


def train_wordpiece(texts: Iterable[str], vocab_size: int = 30522, lowercase: bool = True) -> PreTrainedTokenizerBase:
    """Train a BERT tokenizer of at most `vocab_size` word pieces on `texts` (any strings, read once).

    The special tokens ``[PAD] [UNK] [CLS] [SEP] [MASK]`` have the ids 0 to 4, then come the most frequent characters
    (at most 1,000 and an eighth of the vocabulary, but 128 at least), each alone and as a ``##`` continuation, then
    longer pieces. The result depends on nothing but the arguments. `lowercase` also strips accents, as in the original
    BERT.

    Raises:
        RegrowError: there is no text, or `vocab_size` does not hold the characters of the text.

    >>> tokenizer = train_wordpiece(["low lower lowest", "new newer newest"] * 3, vocab_size=40)
    >>> tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4])
    ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    >>> tokenizer.tokenize("Lowest newer")
    ['lowest', 'newer']
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    # Characters must be known before the trainer starts (see _alphabet) and `texts` may be read only once: so
    # the text waits in a temporary file, not in memory.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as spool:
        characters: Counter[str] = Counter()
        for text in texts:
            characters.update(text)
            spool.write(text + "\n")
        spool.seek(0)
        alphabet = _alphabet(characters, normalizer, _most_characters(vocab_size))
        if not alphabet:
            raise RegrowError("there is no text to train a tokenizer on: the texts are empty")
        fixed = [*SPECIAL_TOKENS, *alphabet, *("##" + character for character in alphabet)]
        if vocab_size < len(fixed):
            raise RegrowError(
                f"vocab_size={vocab_size} is too small for the {len(alphabet)} characters of the text: "
                f"at least {len(fixed)} is needed"
            )
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=fixed,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator(spool, trainer)
    return _bert_tokenizer(backend.get_vocab(), lowercase)


def _alphabet(characters: Counter[str], normalizer: Any, most: int) -> list[str]:
    """The ``most`` frequent characters after normalisation, in code point order.

    The trainer numbers ``##`` characters in the order of a randomly seeded hash map, and breaks ties between
    merges by those numbers: two runs give two vocabularies. Handing it all characters as fixed tokens removes
    the chance.
    """
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        for normal in normalizer.normalize_str(character):
            if not normal.isspace():
                counts[normal] += count
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[:most]
    return sorted(frequent)


def load_tokenizer(path_or_dir: str | Path, lowercase: bool = True) -> PreTrainedTokenizerBase:
    """Load a BERT tokenizer from a ``vocab.txt``, a ``tokenizer.json`` or a folder that holds one of them.

    `lowercase` counts only for a bare vocabulary; ``tokenizer.json``, and ``tokenizer_config.json`` beside a
    ``vocab.txt`` in a folder, say it themselves.

    Raises:
        RegrowError: the path does not exist, is no WordPiece vocabulary, or lacks a special token.
    """
    path = Path(path_or_dir).expanduser()
    if path.is_dir():
        file = next((path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()), None)
        if file is None:
            raise RegrowError(f"tokenizer folder {path} holds neither tokenizer.json nor vocab.txt")
        config = path / "tokenizer_config.json"
        if file.name == "vocab.txt" and config.is_file():
            lowercase = bool(_read_json(config).get("do_lower_case", lowercase))
        path = file
    if not path.is_file():
        raise RegrowError(f"tokenizer {path}: no such file or folder; give a vocab.txt or a saved tokenizer")
    if path.suffix == ".json":
        return _from_json(path)
    try:
        pieces = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise RegrowError(f"vocabulary {path} is not UTF-8 text: one word piece per line is expected") from error
    vocab = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        repeated = Counter(pieces).most_common(1)[0][0]
        raise RegrowError(f"vocabulary {path} holds {repeated!r} more than once: each line must be another piece")
    _require_special(vocab, path)
    return _bert_tokenizer(vocab, lowercase)


def _from_json(path: Path) -> PreTrainedTokenizerBase:
    content = _read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "WordPiece" or not isinstance(model.get("vocab"), dict):
        raise RegrowError(f"tokenizer {path} is not a WordPiece tokenizer: BERT pre-training needs '##' word pieces")
    _require_special(model["vocab"], path)
    normalizer = content.get("normalizer") or {}
    return _bert_tokenizer(
        model["vocab"],
        bool(normalizer.get("lowercase", False)),
        strip_accents=normalizer.get("strip_accents"),
        tokenize_chinese_chars=bool(normalizer.get("handle_chinese_chars", True)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RegrowError(f"{path} is not valid JSON ({error}): save the tokenizer again") from error
    if not isinstance(content, dict):
        raise RegrowError(f"{path} does not hold a JSON object: save the tokenizer again")
    return content


def _require_special(vocab: dict[str, int], path: Path) -> None:
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise RegrowError(
            f"vocabulary {path} lacks {', '.join(missing)}: add {'it' if len(missing) == 1 else 'them'} or "
            "use a vocabulary made for BERT"
        )


def _bert_tokenizer(vocab: dict[str, int], lowercase: bool, **options: Any) -> PreTrainedTokenizerBase:
    ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
    return BertTokenizer(vocab=ordered, do_lower_case=lowercase, **options)


def encode_sentences(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> list[list[int]]:
    """The ids of each sentence, without ``[CLS]`` and ``[SEP]``. A literal ``[MASK]`` in the text is plain
    text.

    >>> tokenizer = train_wordpiece(["a mask [ ]"], vocab_size=40)
    >>> tokenizer.mask_token_id in encode_sentences(tokenizer, ["a [MASK]"])[0]
    False
    """
    if not sentences:
        return []
    encoded = tokenizer(
        list(sentences),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Sequence[str]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split and encode documents given as paragraphs: for each ``(ids, ends)``, both int32.

    ``ids`` holds the ids of all its sentences in a row, and ``ends[k]`` is where sentence ``k`` ends.
    Sentences without any word piece are left out.

    >>> tokenizer = train_wordpiece(["no one two now . !"], vocab_size=60)
    >>> [(ids, ends)] = encode_documents(tokenizer, [["No one. Two.", "Now!"]])
    >>> ends
    array([3, 5, 7], dtype=int32)
    """
    sentences: list[str] = []
    stops = []
    for document in documents:
        for paragraph in document:
            sentences.extend(split_sentences(paragraph))
        stops.append(len(sentences))
    encoded = encode_sentences(tokenizer, sentences)
    result = []
    start = 0
    for stop in stops:
        kept = [ids for ids in encoded[start:stop] if ids]
        flat = np.fromiter((number for ids in kept for number in ids), dtype=np.int32)
        result.append((flat, np.cumsum([len(ids) for ids in kept], dtype=np.int32)))
        start = stop
    return result


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the ids of a text: vocabulary, normalisation and pre-tokenisation."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    relevant = {key: backend.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    return hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=16).hexdigest()
