"""Training, loading and saving WordPiece tokenizers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizer

from regrow.bert.tokenizer import (
    SPECIAL_TOKENS,
    encode_documents,
    encode_sentences,
    load_tokenizer,
    tokenizer_fingerprint,
    train_wordpiece,
)
from regrow.errors import RegrowError

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Unaffable foxes were jumping quickly."] * 5
REAL_VOCABULARY = Path(__file__).parents[2] / "../shared/data/vocab/bert-base-uncased-vocab.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS, vocab_size=90)


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert len(tokenizer) == 90
    assert sorted(tokenizer.get_vocab().values()) == list(range(90))


def test_reads_any_iterable_once(tokenizer):
    again = train_wordpiece(iter(TEXTS), vocab_size=90)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_training_is_the_same_in_another_process(tokenizer):
    # The trainer's hash maps are seeded per process, so only another process can show the chance they bring in.
    code = (
        "import json, sys; from regrow.bert.tokenizer import train_wordpiece; "
        "print(json.dumps(train_wordpiece(json.loads(sys.argv[1]), vocab_size=90).get_vocab()))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(result.stdout) == tokenizer.get_vocab()


def test_case(tokenizer):
    assert tokenizer.tokenize("THE Fóx") == tokenizer.tokenize("the fox")
    cased = train_wordpiece(["Fox Fóx fox"], vocab_size=60, lowercase=False)
    assert "ó" in cased.get_vocab()
    assert cased.tokenize("Fox") != cased.tokenize("fox")


def test_training_errors():
    with pytest.raises(RegrowError, match="no text"):
        train_wordpiece([" ", ""])
    with pytest.raises(RegrowError, match=r"vocab_size=10 is too small .* at least 11 "):
        train_wordpiece(["abc"], vocab_size=10)
    assert len(train_wordpiece(["abc"], vocab_size=11)) == 11


def test_rare_characters_leave_room_for_pieces() -> None:
    """A corpus with many scripts must not fill a small vocabulary with single characters."""
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 900)))
    words = [f"{a}{b}ing {a}{b}er" for a in "bcdfghklmnprst" for b in "aeiou"]
    vocabulary = train_wordpiece([*words * 5, rare], vocab_size=2048).get_vocab()
    assert sum(len(piece) == 1 for piece in vocabulary) == 128
    assert {"a", "z", "##g"} - vocabulary.keys() == {"z"} and "baing" in vocabulary


def test_saved_tokenizer_reloads(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer("Unaffable, dog", "Foxes!").data
    automatic = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(automatic, BertTokenizer)
    assert automatic("Unaffable, dog", "Foxes!").data == expected
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded("Unaffable, dog", "Foxes!").data == expected
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_vocabulary_file(tokenizer, tmp_path):
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    loaded = load_tokenizer(path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(tmp_path, lowercase=False).do_lower_case is False
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).do_lower_case is False
    path.write_text("\r\n".join(pieces) + "\r\n", encoding="utf-8", newline="")
    assert load_tokenizer(path).get_vocab() == tokenizer.get_vocab()


def test_missing_special_tokens_are_named(tokenizer, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n")
    with pytest.raises(RegrowError, match=r"vocab\.txt lacks \[MASK\]: add it"):
        load_tokenizer(path)
    path.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(RegrowError, match=r"lacks \[SEP\], \[MASK\]: add them"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer.json"
    content = json.loads(file.read_text())
    del content["model"]["vocab"]["[MASK]"]
    file.write_text(json.dumps(content))
    with pytest.raises(RegrowError, match=r"tokenizer\.json lacks \[MASK\]"):
        load_tokenizer(tmp_path / "saved")


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(RegrowError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(RegrowError, match="holds neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RegrowError, match="not valid JSON"):
        load_tokenizer(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"model": {"type": "BPE", "vocab": {}}}')
    with pytest.raises(RegrowError, match="not a WordPiece tokenizer"):
        load_tokenizer(tmp_path / "b.json")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    with pytest.raises(RegrowError, match="not UTF-8"):
        load_tokenizer(tmp_path / "latin.txt")
    (tmp_path / "twice.txt").write_text("\n".join([*SPECIAL_TOKENS, "a", "b", "a"]))
    with pytest.raises(RegrowError, match="'a' more than once"):
        load_tokenizer(tmp_path / "twice.txt")


def test_special_tokens_in_the_text_are_text(tokenizer):
    [ids] = encode_sentences(tokenizer, ["the [MASK] [SEP] fox"])
    assert not {tokenizer.mask_token_id, tokenizer.sep_token_id} & set(ids)
    assert encode_sentences(tokenizer, []) == []


def test_documents_keep_their_sentences(tokenizer):
    documents = [["The fox. The dog.", "Foxes!"], [""], ["\u200b"], ["The dog."]]
    encoded = encode_documents(tokenizer, documents)
    sentences = ["The fox.", "The dog.", "Foxes!"]
    expected = encode_sentences(tokenizer, sentences)
    ids, ends = encoded[0]
    assert [part.tolist() for part in np.split(ids, ends)[:-1]] == expected
    assert ends[-1] == len(ids)
    assert [len(ends) for _, ends in encoded] == [3, 0, 0, 1]


def test_fingerprint_tells_tokenizers_apart(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("text", padding="max_length", max_length=9, truncation=True)  # leaves its mark on the backend
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(train_wordpiece(TEXTS, vocab_size=89)) != before
    assert tokenizer_fingerprint(train_wordpiece(TEXTS, vocab_size=90, lowercase=False)) != before


@pytest.mark.skipif(not REAL_VOCABULARY.is_file(), reason="needs BERT's own vocabulary beside the project")
def test_bert_vocabulary():
    tokenizer = load_tokenizer(REAL_VOCABULARY)
    assert len(tokenizer) == 30522
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id) == (0, 101, 103)
    assert tokenizer.tokenize("Unaffable") == ["una", "##ffa", "##ble"]
