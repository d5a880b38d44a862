"""The rules of the splitter, one case each."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.bert.sentences import split_sentences

CASES = {
    "plain": ["It rained.", "We stayed in!", "Did you?", "Yes."],
    "quotes close": ['"Go on!" she said.', '"No." He sat.'[:5], "He sat."],
    "brackets": ["(It was late.)", "They left [early].", "Done."],
    "titles": ["Dr. Who met Mrs. Brown and Gen. Lee at St. Paul's.", "Nobody came."],
    "latin": ["Use tools, e.g. Python, i.e. This one, cf. Knuth.", "Done."],
    "initials": ["J. S. Bach wrote it.", "George W. Bush read it."],
    "numbers": ["See No. 5 on pp. 3 of vol. 2, Jan. 1.", "Pi is 3.14 or so.", "1999 came."],
    "a sentence may end in a number word": ["She said no.", "He left."],
    "dotted": ["The U.S. Army came at 5 p.m. Monday.", "He was in the U.S.", "They left."],
    "companies": ["Acme Inc. Press and Sons Ltd. of York.", "It was sold to Acme Inc.", "The end."],
    "numerals": ["It was World War I.", "Then came World War II.", "It ended."],
    "ellipsis": ["Well ... maybe.", "So…", "And then?!", "Yes."],
    "reference marks": ["It is so.[12]", "It was so.[1][2]", "Fine."],
    "web": ["See example.com or version 1.2.3 of it.", "OK."],
    "not English": ["Él vino.", "¿Quién?", "Ça va.", "Они ушли."],
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    sentences = CASES[name]
    assert split_sentences(" ".join(sentences)) == sentences


def test_lower_case_never_begins_a_sentence():
    assert split_sentences("He asked why? and left. so it is.") == ["He asked why? and left. so it is."]


def test_full_width_terminators_need_no_space():
    assert split_sentences("今日は雨。明日は晴れ！") == ["今日は雨。", "明日は晴れ！"]  # noqa: RUF001


@given(st.text(alphabet=st.sampled_from("ab AZ.!?\"'()[]1 \n\tU…")))
def test_nothing_is_lost(text):
    sentences = split_sentences(text)
    assert all(s and s == s.strip() for s in sentences)
    assert re.sub(r"\s", "", "".join(sentences)) == re.sub(r"\s", "", text)
