"""What masking must never do, and the shares of what it does."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.bert.masking import IGNORE, WholeWordMasker
from regrow.bert.tokenizer import train_wordpiece
from regrow.errors import RegrowError

VOCAB = 60
PAD, CLS, SEP, MASK = 0, 1, 2, 3
CONTINUATION = np.arange(VOCAB) >= 40
SPECIAL = np.isin(np.arange(VOCAB), [PAD, CLS, SEP])


def masker(**options):
    return WholeWordMasker((VOCAB, CONTINUATION, SPECIAL, MASK), **options)


def words_of(ids):
    """Positions of each word, by the plain rule: a special token ends a word, '##' continues one."""
    words, previous_special = [], True
    for position, token in enumerate(ids):
        special = bool(SPECIAL[token])
        if not special:
            if CONTINUATION[token] and not previous_special:
                words[-1].append(position)
            else:
                words.append([position])
        previous_special = special
    return words


pieces = st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=70)
sequences = st.builds(lambda a, b: np.array([CLS, *a, SEP, *b, SEP], dtype=np.int32), pieces, pieces)


@given(sequences, st.integers(0, 2**32), st.integers(1, 25), st.sampled_from([0.01, 0.15, 0.5, 1.0]))
@settings(max_examples=200, deadline=None)
def test_invariants_of_whole_word_masking(ids, seed, most, probability):
    before = ids.copy()
    rng = np.random.default_rng(seed)
    masked, labels = masker(max_predictions=most, probability=probability).mask(ids, rng)
    assert (ids == before).all()
    assert masked.dtype == labels.dtype == np.int64
    assert masked.shape == labels.shape == ids.shape
    chosen = labels != IGNORE
    allowed = min(most, max(1, round(probability * len(ids))))
    assert chosen.sum() <= allowed
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()
    assert not SPECIAL[ids[chosen]].any()
    assert ((masked >= 0) & (masked < VOCAB)).all()
    words = words_of(ids)
    assert all(chosen[word].all() or not chosen[word].any() for word in words)
    room = allowed - chosen.sum()  # a word is left out only when it does not fit
    assert all(chosen[word].all() or len(word) > room for word in words)


@given(sequences, st.integers(0, 2**32))
@settings(deadline=None)
def test_single_pieces_fill_the_number_exactly(ids, seed):
    _, labels = masker(whole_word=False).mask(ids, np.random.default_rng(seed))
    expected = min(20, max(1, round(0.15 * len(ids))), int((~SPECIAL[ids]).sum()))
    assert (labels != IGNORE).sum() == expected


def test_nothing_to_mask():
    ids = np.array([CLS, SEP, SEP])
    for whole_word in (True, False):
        masked, labels = masker(whole_word=whole_word).mask(ids, np.random.default_rng(0))
        assert (masked == ids).all()
        assert (labels == IGNORE).all()


def test_words_that_exceed_the_number_are_skipped():
    ids = np.array([CLS, 10, 41, 42, 11, 43, SEP])  # n = 1, both words are longer
    _, labels = masker().mask(ids, np.random.default_rng(0))
    assert (labels == IGNORE).all()


def test_a_continuation_after_a_separator_is_a_word_of_its_own():
    ids = np.array([CLS, 10, SEP, 41, SEP])
    seen = set()
    for seed in range(50):
        _, labels = masker().mask(ids, np.random.default_rng(seed))
        seen.add(tuple(np.flatnonzero(labels != IGNORE)))
    assert seen == {(1,), (3,)}


@pytest.mark.parametrize("whole_word", [True, False])
def test_shares(whole_word):
    """80 % masked, 10 % the same, 10 % uniform over the vocabulary, special ids included; places uniform."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([[CLS], np.tile([10, 11, 41, 12], 31), [SEP]])
    m = masker(whole_word=whole_word)
    outcomes, counts = [], np.zeros(len(ids))
    n = 3000
    for _ in range(n):
        masked, labels = m.mask(ids, rng)
        chosen = np.flatnonzero(labels != IGNORE)
        counts[chosen] += 1
        outcomes.append(np.stack([masked[chosen], ids[chosen]]))
    masked, original = np.concatenate(outcomes, axis=1)
    total = len(masked)

    def close(share, expected):
        return abs(share - expected) < 5 * (expected / total) ** 0.5

    assert close((masked == MASK).mean(), 0.8 + 0.1 / VOCAB)
    assert close((masked == original).mean(), 0.1 + 0.1 / VOCAB)
    others = np.bincount(masked[(masked != MASK) & (masked != original)], minlength=VOCAB)
    unused = np.setdiff1d(np.arange(VOCAB), [MASK, 10, 11, 12, 41])
    expected = 0.1 * total / VOCAB
    assert (abs(others[unused] - expected) < 6 * expected**0.5).all()
    # round(.15 * 126) = 19 of 124 candidates
    inner = counts[1:-1] / n
    assert inner.mean() == pytest.approx(19 / 124, rel=0.01)
    assert inner.max() - inner.min() < 0.06


def test_same_generator_same_mask():
    ids = np.array([CLS, *range(4, 50), SEP])
    one, two = (masker().mask(ids, np.random.default_rng(7)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_from_a_tokenizer():
    tokenizer = train_wordpiece(["unaffable affable un able"] * 5, vocab_size=40)
    m = WholeWordMasker(tokenizer)
    assert m.vocab_size == len(tokenizer)
    assert m.mask_id == tokenizer.mask_token_id
    assert set(np.flatnonzero(m.is_special)) == {0, 2, 3}  # [UNK] may be predicted
    for piece, number in tokenizer.get_vocab().items():
        assert m.is_continuation[number] == piece.startswith("##")


def test_bad_arguments():
    with pytest.raises(RegrowError, match="max_predictions=0"):
        masker(max_predictions=0)
    with pytest.raises(RegrowError, match=r"probability=1\.5"):
        masker(probability=1.5)
    with pytest.raises(RegrowError, match="is_special has shape"):
        WholeWordMasker((VOCAB, CONTINUATION, SPECIAL[:5], MASK))
    tokenizer = train_wordpiece(["a"], vocab_size=20)
    tokenizer.mask_token = None
    with pytest.raises(RegrowError, match="no mask token"):
        WholeWordMasker(tokenizer)


def test_speed_is_of_the_right_order():
    """A guard against an accidental loop over tokens; the bound is far from what a quiet machine does."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([[CLS], rng.integers(4, VOCAB, 126), [SEP]])
    m = masker()
    start = time.process_time()
    for _ in range(500):
        m.mask(ids, rng)
    assert 500 / (time.process_time() - start) > 1000
