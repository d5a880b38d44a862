"""Sentence pairs: a hand-traced example, conservation of tokens, and the shares of the recipe."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import regrow.bert.pairs as module
from regrow.bert.pairs import Pair, pairs_from_document, truncate_pair

OTHER = [[100, 101], [102], [103, 104, 105]]


class Scripted:
    """A generator whose draws are written down, to trace an example by hand."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def _next(self, *_, **__):
        return self.draws.pop(0)

    random = integers = binomial = _next


def test_hand_traced_example():
    document = [[1, 1], [2, 2], [3, 3], [4]]
    rng = Scripted(
        0.9,  # not short: the target is 5 tokens
        # Sentences 0-2 make a chunk of 6 >= 5 tokens.
        1,  # the first segment is sentence 0
        0.1,  # the second is random:
        1,  # from sentence 1 of the other document; wants 5 - 2 = 3 tokens: takes 102, then 103-105
        # 2 + 4 tokens are 1 too many: the longer, second, loses it
        1,  # at its front
        # Sentences 1 and 2 are given back: the next chunk is 1, 2, 3.
        3,  # the first segment is sentences 1 and 2
        0.7,  # the second is the true one: sentence 3; nothing is left
    )
    pairs = list(pairs_from_document(document, 0, lambda rng: (1, OTHER), rng, max_tokens=5))
    assert pairs == [
        Pair([1, 1], [103, 104, 105], True),
        Pair([2, 2, 3, 3], [4], False),
    ]
    assert not rng.draws


def test_short_target_and_single_sentence_chunk():
    rng = Scripted(
        0.05,  # short:
        2,  # a target of 2 tokens, met by each sentence alone
        0,  # so the second segment is random without a draw, here from sentence 0
        2,  # and then from sentence 2
    )
    pairs = list(pairs_from_document([[1, 1], [2, 2]], 0, lambda rng: (1, OTHER), rng, max_tokens=9))
    assert pairs == [Pair([1, 1], [100, 101], True), Pair([2, 2], [103, 104, 105], True)]


def test_asks_again_for_another_document():
    asked = iter([(0, [[7]])] * 9 + [(3, OTHER)])
    [pair] = pairs_from_document([[1]], 0, lambda rng: next(asked), np.random.default_rng(0))
    assert set(pair.second) <= set(range(100, 106))
    asked = iter([(0, [[7]])] * 10)
    [pair] = pairs_from_document([[1]], 0, lambda rng: next(asked), np.random.default_rng(0))
    assert pair.second == [7]


documents = st.lists(st.integers(1, 12), min_size=1, max_size=30)


@given(documents, st.integers(2, 40), st.integers(0, 2**32))
@settings(deadline=None)
def test_unused_sentences_are_given_back(lengths, max_tokens, seed):
    """But for truncation and random segments, the pairs hold every token of the document once, in order."""
    document = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "truncate_pair", lambda first, second, *_: (first, second))
        pairs = list(pairs_from_document(document, 0, lambda rng: (1, [[-1]] * 9), rng, max_tokens))
    seen = [token for pair in pairs for token in [*pair.first, *([] if pair.is_random else pair.second)]]
    assert seen == list(range(sum(lengths)))


@given(documents, st.integers(2, 60), st.integers(0, 2**32))
@settings(deadline=None)
def test_limits_and_labels(lengths, max_tokens, seed):
    document = [[i + 1] * n for i, n in enumerate(lengths)]
    rng = np.random.default_rng(seed)
    for pair in pairs_from_document(document, 0, lambda rng: (1, [[-1]] * 9), rng, max_tokens):
        assert pair.first
        assert pair.second
        assert len(pair.first) + len(pair.second) <= max_tokens
        assert pair.is_random == (pair.second[0] == -1)
        if not pair.is_random:
            assert pair.second[0] > pair.first[-1]


def naive_truncation(first, second, max_tokens):
    """Lengths after removing one token at a time, as the rule is stated."""
    while first + second > max_tokens:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 80), st.integers(0, 2**32))
def test_truncation_is_the_one_token_rule(n_first, n_second, max_tokens, seed):
    first, second = list(range(n_first)), list(range(n_second))
    results = truncate_pair(first, second, max_tokens, np.random.default_rng(seed))
    assert tuple(map(len, results)) == naive_truncation(n_first, n_second, max_tokens)
    for result in results:
        assert result == list(range(result[0], result[0] + len(result)))


def test_truncation_takes_from_both_ends():
    rng = np.random.default_rng(0)
    starts = [truncate_pair(list(range(41)), [0], 22, rng)[0][0] for _ in range(2000)]
    assert np.mean(starts) == pytest.approx(10, abs=0.25)  # binomial(20, 1/2): 5 sigma is 0.25
    assert np.var(starts) == pytest.approx(5, rel=0.25)


def test_shares():
    """Half of the pairs that have a choice are random; a tenth of the documents have a short target."""
    document = [[number] * 10 for number in range(40)]
    rng = np.random.default_rng(0)
    random, lengths = [], set()
    for _ in range(1500):
        for pair in pairs_from_document(document, 0, lambda rng: (1, [[-1] * 10] * 40), rng, 60, 0.0):
            if pair.first[0] < 39:  # a chunk of the last sentence alone has no choice
                random.append(pair.is_random)
                lengths.add(len(pair.first))
    assert np.mean(random) == pytest.approx(0.5, abs=5 * 0.5 / len(random) ** 0.5)
    assert lengths == {10, 20, 30, 40, 50}
    first = [next(pairs_from_document(document, 0, lambda rng: (1, [[2] * 60]), rng, 60)) for _ in range(5000)]
    # A target of up to 50 of the 2..60, so in 49 of 59 short draws, gives a chunk shorter than 60.
    true_pairs = [len(pair.first) + len(pair.second) for pair in first if not pair.is_random]
    shorter = np.mean(np.array(true_pairs) < 60)
    single = 9 / 59  # targets 2..10 make chunks of one sentence, which are never true pairs
    short = 0.1 * (49 - 9) / 59
    expected = short / (1 - 0.1 * single)
    assert shorter == pytest.approx(expected, abs=5 * (expected / len(true_pairs)) ** 0.5)
