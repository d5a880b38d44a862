"""Question answering: files whole and broken, windows, answers from logits, scores."""

import bz2
import copy
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.bert.squad import Answer, Question, best_answers, read_squad, squad_metrics, windows
from regrow.bert.squad.metrics import f1, normalize_answer
from regrow.bert.tokenizer import load_tokenizer, train_wordpiece
from regrow.errors import RegrowError

SHARED = Path(__file__).parents[2] / "../shared/data"

CONTEXT = "Die Brücke \U0001f309 was opened in 1932."
DOCUMENT = {
    "version": "1.1",
    "data": [
        {"title": "Bridges", "paragraphs": []},
        {
            "title": "Sydney",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "q1",
                            "question": "When?",
                            "answers": [{"text": "1932", "answer_start": 27}, {"text": "in 1932", "answer_start": 24}],
                        },
                        {"id": "q2", "question": "Was?", "answers": [{"text": "Brücke", "answer_start": 4}]},
                        {"id": "q3", "question": "Why?", "answers": []},
                    ],
                }
            ],
        },
    ],
}

# Letters a vocabulary knows and does not, of one and of several word pieces and bytes; what is stripped, too.
LETTERS = ["a", "b", "É", "ß", "é", "e\u0301", "ह", "한", "日", "\U0001f309", "1", "$", "-", "\u200b", "\x00", "\u0301"]
SOLID = [letter for letter in LETTERS if letter not in ("\u200b", "\x00", "\u0301")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a b ab aab ba é e 1 - $ ß who when"] * 3, vocab_size=60)


def write(folder, document, name="squad.json"):
    path = folder / name
    path.write_text(json.dumps(document))
    return path


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)],
)
def test_reads_every_compression(tmp_path, suffix, pack):
    path = tmp_path / f"squad.json{suffix}"
    path.write_bytes(pack(json.dumps(DOCUMENT, ensure_ascii=False).encode("utf-8-sig")))
    first, second, third = read_squad(path)
    assert first == Question("q1", "When?", CONTEXT, (Answer("1932", 27), Answer("in 1932", 24)))
    assert second.answers == (Answer("Brücke", 4),)
    assert third.answers == ()


def edited(place, value):
    """DOCUMENT with another value, or none, at a place such as ``qas 1 answers``."""
    document = copy.deepcopy(DOCUMENT)
    node = document["data"][1]["paragraphs"][0]
    *path, last = place
    if path and path[0] == "top":
        node, path = document, path[1:]
    for key in path:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return document


FIRST = ("qas", 0)
ANSWER = (*FIRST, "answers", 0)
PLACE = r"squad\.json, article 2 \('Sydney'\), paragraph 1"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("top", "data"), None, r"squad\.json: 'data' is missing"),
        (("top", "data"), {}, r"squad\.json: 'data' must be a list"),
        (("top", "data"), [], r"squad\.json holds no questions"),
        (("top", "data", 1), 7, r"squad\.json, article 2: an object of SQuAD v1\.1 was expected, not 7"),
        (("top", "data", 0, "paragraphs"), None, r"squad\.json, article 1 \('Bridges'\): 'paragraphs' is missing"),
        (("top", "version"), "v2.0", r"squad\.json is in the format of SQuAD v2, which is not supported"),
        (("context",), None, PLACE + ": 'context' is missing"),
        (("context",), " \n", PLACE + ": 'context' is empty"),
        (("context",), "half \ud83c", PLACE + ": 'context' holds half a surrogate pair at character 5"),
        (("qas",), None, PLACE + ": 'qas' is missing"),
        ((*FIRST, "id"), None, PLACE + ", question 1: 'id' is missing"),
        ((*FIRST, "id"), 1, PLACE + ", question 1: 'id' must be a string, not 1"),
        ((*FIRST, "id"), "q2", PLACE + ", question 'q2': another question has this id"),
        ((*FIRST, "question"), None, PLACE + ", question 'q1': 'question' is missing"),
        ((*FIRST, "answers"), None, PLACE + ", question 'q1': 'answers' is missing"),
        ((*FIRST, "is_impossible"), True, PLACE + r", question 'q1' has no answer .*v2 is not supported"),
        ((*ANSWER, "text"), "", PLACE + ", question 'q1': 'text' is empty"),
        ((*ANSWER, "text"), "1933", "at answer_start=27 the context has '1932', not the answer '1933'; which does not"),
        ((*ANSWER, "answer_start"), None, PLACE + ", question 'q1': 'answer_start' is missing"),
        ((*ANSWER, "answer_start"), True, "'answer_start' must be an integer, not True"),
        ((*ANSWER, "answer_start"), 27.0, r"'answer_start' must be an integer, not 27\.0"),
        ((*ANSWER, "answer_start"), -5, "answer_start=-5 lies outside of the context of 32 characters"),
        ((*ANSWER, "answer_start"), 32, "answer_start=32 lies outside of the context of 32 characters"),
        # Counted in UTF-16 units, as JavaScript does.
        ((*ANSWER, "answer_start"), 28, r"has '932\.', not the answer '1932'; it first stands at 27 \(counted in Uni"),
    ],
)
def test_errors_name_the_place(tmp_path, place, value, message):
    path = write(tmp_path, edited(place, value))
    with pytest.raises(RegrowError, match=message) as caught:
        read_squad(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b"\n", "is empty"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.json", b"[]", r"a\.json: an object of SQuAD v1\.1 was expected"),
        ("a.json", b'{"data": "\xff"}', r"is not UTF-8 text \(byte 10\)"),
        ("a.json.xz", lzma.compress(b"{}" * 1000)[:-20], r"cannot read .*a\.json\.xz"),
        # with no time in its header: the workers of a parallel run must agree on the name of the test
        ("a.json.gz", gzip.compress(b"{}" * 1000, mtime=0)[:-12], r"cannot read .*a\.json\.gz"),
        ("a.json.bz2", b"{}", r"cannot read .*a\.json\.bz2"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RegrowError, match=message):
        read_squad(path)


def test_no_such_file(tmp_path):
    with pytest.raises(RegrowError, match=r"none\.json: No such file or directory"):
        read_squad(tmp_path / "none.json")


def test_a_file_that_only_names_is_impossible_is_v1(tmp_path):
    assert len(read_squad(write(tmp_path, edited((*FIRST, "is_impossible"), False)))) == 3


# ---------------------------------------------------------------------------------------------------- windows


def test_window_by_hand(tokenizer):
    question = Question("q1", "Who a b", "a b ab. ba [SEP] É", (Answer("ba", 8),))
    found = windows([question], tokenizer, max_length=12, stride=3, query_length=2)
    tokens = [tokenizer.convert_ids_to_tokens(window.input_ids) for window in found]
    before = ["[CLS]", "who", "a", "[SEP]"]  # the question is cut to two tokens
    # The text's own [SEP] is no special token: its letters and brackets are not in this vocabulary.
    assert tokens == [
        [*before, "a", "b", "ab", "[UNK]", "ba", "[UNK]", "[UNK]", "[SEP]"],
        [*before, "[UNK]", "ba", "[UNK]", "[UNK]", "[UNK]", "e", "[SEP]"],
    ]
    first, second = found
    assert (first.start, first.end, second.start, second.end) == (8, 8, 5, 5)
    assert first.offsets == [None] * 4 + [(0, 1), (2, 3), (4, 6), (6, 7), (8, 10), (11, 12), (12, 15), None]
    assert second.offsets[4:] == [(6, 7), (8, 10), (11, 12), (12, 15), (15, 16), (17, 18), None]
    assert first.token_type_ids.tolist() == [0] * 4 + [1] * 8
    # "ba" has 4 and 2 neighbours in the first window, 1 and 4 in the second; "[" has 1 against 2.
    assert np.flatnonzero(first.is_max_context).tolist() == [4, 5, 6, 7, 8]
    assert np.flatnonzero(second.is_max_context).tolist() == [6, 7, 8, 9]
    assert first.input_ids.dtype == np.int32


def test_accents_that_are_stripped_belong_to_their_letter(tokenizer):
    [window] = windows([Question("q", "who", "e\u0301 a")], tokenizer)
    assert window.spans.tolist() == [[0, 2], [3, 4]]


def test_contexts_without_tokens_have_one_empty_window(tokenizer):
    question = Question("q", "who", "\u200b", (Answer("\u200b", 0),))
    [window] = windows([question], tokenizer)
    assert tokenizer.convert_ids_to_tokens(window.input_ids) == ["[CLS]", "who", "[SEP]", "[SEP]"]
    assert (window.start, window.end, window.offsets) == (0, 0, [None] * 4)
    assert best_answers([question], [window], np.zeros((1, 4)), np.zeros((1, 4))) == {"q": []}


def test_no_answers_no_labels(tokenizer):
    [window] = windows([Question("q", "who", "a b")], tokenizer)
    assert (window.start, window.end) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride=0"),
        ({"query_length": 0}, "query_length=0"),
        ({"max_length": 67}, "max_length=67 leaves no room for the context beside query_length=64"),
    ],
)
def test_windows_check_their_arguments(tokenizer, arguments, message):
    with pytest.raises(RegrowError, match=message):
        windows([], tokenizer, **arguments)
    assert windows([], tokenizer, max_length=68) == []


words = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4).map("".join)
solid_words = st.lists(st.sampled_from(SOLID), min_size=1, max_size=4).map("".join)
shapes = st.fixed_dictionaries(
    {"max_length": st.integers(8, 40), "stride": st.integers(1, 40), "query_length": st.integers(1, 4)}
)


@st.composite
def asked(draw, word=words):
    """A question whose answer is some words of its context."""
    parts = draw(st.lists(word, min_size=1, max_size=60))
    first = draw(st.integers(0, len(parts) - 1))
    last = draw(st.integers(first, min(first + 3, len(parts) - 1)))
    text, start = " ".join(parts[first : last + 1]), len(" ".join(parts[:first])) + (first > 0)
    return Question("q", draw(words), " ".join(parts), (Answer(text, start),))


def context_begins(found, shape):
    """Which context token each window begins with, by the rule."""
    room = shape["max_length"] - found[0].context_start - 1
    return [min(shape["stride"], room) * number for number in range(len(found))], room


@given(question=asked(), shape=shapes)
def test_windows_cover_the_context(tokenizer, question, shape):
    [whole] = windows([question], tokenizer, max_length=10_000, query_length=4)
    found = windows([question], tokenizer, **shape)
    begins, room = context_begins(found, shape)
    seen, most = [0] * len(whole.spans), [0] * len(whole.spans)
    for begin, window in zip(begins, found, strict=True):
        stop = begin + len(window.spans)
        assert len(window) <= shape["max_length"]
        ids = whole.input_ids[whole.context_start : -1]
        assert np.array_equal(window.input_ids[window.context_start : -1], ids[begin:stop])
        assert np.array_equal(window.spans, whole.spans[begin:stop])
        assert stop == min(begin + room, len(whole.spans))
        for token in range(begin, stop):
            seen[token] += 1
            most[token] += int(window.most_context[token - begin])
    assert all(seen)
    assert all(count == 1 for count in most)
    assert stop == len(whole.spans)
    assert all(begin + room < len(whole.spans) for begin in begins[:-1])


@given(question=asked(), shape=shapes)
def test_most_context_is_as_in_bert(tokenizer, question, shape):
    found = windows([question], tokenizer, **shape)
    begins, _ = context_begins(found, shape)
    for token in range(begins[-1] + len(found[-1].spans)):
        scores = {}
        for number, (begin, window) in enumerate(zip(begins, found, strict=True)):
            if begin <= token < begin + len(window.spans):
                sides = token - begin, begin + len(window.spans) - 1 - token
                scores[number] = 100 * min(sides) + len(window.spans)
        owner = max(scores, key=lambda number: (scores[number], -number))
        assert found[owner].most_context[token - begins[owner]]


@given(question=asked(), shape=shapes)
def test_answers_survive_the_way_through_tokens(tokenizer, question, shape):
    [answer] = question.answers
    [whole] = windows([question], tokenizer, max_length=10_000, query_length=4)
    stop = answer.start + len(answer.text)
    touching = [i for i, (a, b) in enumerate(whole.spans) if a < stop and b > answer.start]
    found = windows([question], tokenizer, **shape)
    begins, _ = context_begins(found, shape)
    for begin, window in zip(begins, found, strict=True):
        inside = bool(touching) and begin <= touching[0] and touching[-1] < begin + len(window.spans)
        assert (window.start > 0) == inside
        if inside:
            characters = question.context[window.offsets[window.start][0] : window.offsets[window.end][1]]
            covered = "".join(c for c in answer.text if c not in "\u200b\x00 ").strip("\u0301")
            assert covered in "".join(c for c in characters if c not in "\u200b\x00 ")
        else:
            assert window.end == 0


# ---------------------------------------------------------------------------------------------------- answers


def perfect(found):
    """Logits of a model that knows the answers."""
    start, end = np.full((2, len(found), max(map(len, found))), -5.0)
    for number, window in enumerate(found):
        if window.start:
            start[number, window.start] = end[number, window.end] = 5.0
    return start, end


@given(questions=st.lists(asked(solid_words), min_size=1, max_size=3), shape=shapes)
def test_perfect_logits_give_perfect_answers(tokenizer, questions, shape):
    questions = [Question(f"q{i}", q.question, q.context, q.answers) for i, q in enumerate(questions)]
    found = windows(questions, tokenizer, **shape)
    # A span is judged in the window with most context for its first token, which must hold it whole.
    known = {w.question for w in found if w.start and w.is_max_context[w.start]}
    best = best_answers(questions, found, *perfect(found), max_answer_length=40)
    predictions = {questions[i].id: best[f"q{i}"][0].text for i in known}
    assert all(predictions[questions[i].id] == questions[i].answers[0].text for i in known)
    if known:
        metrics = squad_metrics([questions[i] for i in known], predictions)
        assert metrics["exact_match"] == 100
    for i, question in enumerate(questions):
        room = shape["max_length"] - 3 - min(shape["query_length"], len(tokenizer.tokenize(question.question)))
        step = min(shape["stride"], room)
        short = len(tokenizer.tokenize(question.answers[0].text)) <= (room - 1 - step) // 2
        assert not short or i in known  # with as much overlap no short answer is lost


@given(question=asked(solid_words), shape=shapes, seed=st.integers(0, 2**32), longest=st.integers(1, 8))
def test_candidates_are_the_best_of_all_spans(tokenizer, question, shape, seed, longest):
    found = windows([question], tokenizer, **shape)
    rng = np.random.default_rng(seed)
    start, end = rng.normal(size=(2, len(found), max(map(len, found)) + 2))
    wanted = {}
    for number, window in enumerate(found):
        pairs = ((i, i + more) for i in range(len(window)) for more in range(longest) if i + more < len(window))
        for i, j in pairs:
            if window.is_max_context[i] and window.offsets[j] is not None:
                text = question.context[window.offsets[i][0] : window.offsets[j][1]]
                wanted[text] = max(wanted.get(text, -np.inf), start[number, i] + end[number, j])
    best = best_answers([question], found, start, end, n_best=5, max_answer_length=longest)["q"]
    ordered = sorted(wanted.items(), key=lambda item: -item[1])[:5]
    assert [(c.text, c.score) for c in best] == ordered
    assert [question.context[c.start : c.end] for c in best] == [c.text for c in best]
    exponentials = np.exp([score for _, score in ordered])
    np.testing.assert_allclose([c.probability for c in best], exponentials / exponentials.sum(), rtol=1e-12)


def test_equal_scores_and_equal_texts(tokenizer):
    question = Question("q", "who", " ".join(["a"] * 50 + ["b"]))
    found = windows([question], tokenizer)
    zeros = np.zeros((1, len(found[0])), dtype=np.float16)
    best = best_answers([question], found, zeros, zeros, n_best=3, max_answer_length=2)["q"]
    # Of 50 "a" the first; as many more candidates as it takes to find three that differ.
    assert [(c.text, c.start) for c in best] == [("a", 0), ("a a", 0), ("a b", 98)]
    assert [c.probability for c in best] == pytest.approx([1 / 3] * 3)


def test_best_answers_check_their_arguments(tokenizer):
    questions = [Question("q", "who", "a b"), Question("r", "who", "b a b")]
    found = windows(questions, tokenizer)
    start = np.zeros((2, 7))
    for change, message in [
        ({"n_best": 0}, "n_best=0"),
        ({"max_answer_length": 0}, "max_answer_length=0"),
        ({"start_logits": start[:1]}, r"start_logits has shape \[1, 7\]: \[2, 7\] is needed"),
        ({"end_logits": start[:, :6]}, r"end_logits has shape \[2, 6\]"),
        ({"end_logits": np.full((2, 7), np.nan)}, "logits of window 0 are not finite"),
        ({"questions": questions[:1]}, "number 1 is of question 1, and there are 1"),
        ({"questions": [*questions, Question("s", "who", "a")]}, "none is of question 's'"),
        ({"questions": [questions[0]] * 2}, "number 1 ends behind the context of question 'q'"),
        ({"questions": [questions[1]] * 2}, "two have the id 'r'"),
    ]:
        arguments = {"questions": questions, "windows": found, "start_logits": start, "end_logits": start} | change
        with pytest.raises(RegrowError, match=message):
            best_answers(**arguments)
    padded = np.where(np.arange(9) < 7, 0.0, np.nan)  # what lies behind the window is not looked at
    assert best_answers(questions[1:], windows(questions[1:], tokenizer), padded[None], padded[None])


# ----------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", True, 1.0),
        ("10,000", "10000", True, 1.0),
        ("well-known", "wellknown", True, 1.0),  # punctuation vanishes, it does not part words
        ("theatre", "atre", False, 0.0),  # an article is a word of its own
        ("in the year 1932", "1932", False, 0.5),  # P = 1/3, R = 1
        ("b b c", "b c c", False, 2 / 3),  # bags: one b and one c are common
        ("Café", "Cafe", False, 0.0),  # accents count
        ("1990\u20131991", "1990-1991", False, 0.0),  # only ASCII punctuation is dropped
        ("The", "an", True, 0.0),  # nothing is left of either
        ("", "x", False, 0.0),
    ],
)
def test_scores_by_hand(prediction, answer, exact, expected):
    question = Question("q", "?", answer, (Answer(answer, 0),))
    found = squad_metrics([question], {"q": prediction})
    assert found == {"exact_match": 100.0 * exact, "f1": pytest.approx(100 * expected)}


def test_the_best_answer_counts_and_what_is_missing_scores_nothing():
    context = "in the spring of 1932"
    first = Question("q", "?", context, (Answer("spring of 1932", 7), Answer("1932", 17)))
    assert squad_metrics([first], {"q": "1932."}) == {"exact_match": 100, "f1": 100}
    second = Question("r", "?", context, (Answer("1932", 17),))
    assert squad_metrics([first, second], {"q": "spring"}) == {"exact_match": 0, "f1": pytest.approx(25)}


@given(st.text(), st.text())
def test_scores_have_their_bounds(prediction, answer):
    assert f1(prediction, answer) == f1(answer, prediction)
    same = normalize_answer(prediction) == normalize_answer(answer)
    assert f1(prediction, answer) == 1.0 if same and normalize_answer(answer) else 0 <= f1(prediction, answer) <= 1
    assert normalize_answer(prediction) == " ".join(normalize_answer(prediction).split())


def test_scores_check_their_arguments():
    question = Question("q", "?", "a", (Answer("a", 0),))
    with pytest.raises(RegrowError, match="questions is empty"):
        squad_metrics([], {})
    with pytest.raises(RegrowError, match="no question has the id 'x'"):
        squad_metrics([question], {"q": "a", "x": "b"})
    with pytest.raises(RegrowError, match="question 'r' has no answers"):
        squad_metrics([question, Question("r", "?", "a")], {})


# -------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(("file", "n_questions"), [("train_subset.json.xz", 8244), ("eval_xquad_en.json", 1190)])
def test_real_answers_survive(file, n_questions):
    questions = read_squad(SHARED / "squad" / file)
    assert len(questions) == n_questions
    found = windows(questions, load_tokenizer(SHARED / "vocab/bert-base-uncased-vocab.txt"))
    assert {window.question for window in found if window.start} == set(range(n_questions))
    best = best_answers(questions, found, *perfect(found))
    metrics = squad_metrics(questions, {identity: candidates[0].text for identity, candidates in best.items()})
    # A few answers are longer than 30 tokens, or end within a word piece.
    assert metrics["exact_match"] > 99.6 and metrics["f1"] > 99.6
