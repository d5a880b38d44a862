r"""A small rule-based sentence splitter for English and other languages that write ``.``, ``!`` and ``?``.

A boundary is: one or more of ``. ! ? …``, any closing quotes and brackets (and reference marks such as
``[3]``), white space, and then something that can begin a sentence, which is anything but a lower-case
letter. After a full stop there is *no* boundary when the word before it is

1. a title or a Latin short form that always has something to follow (``Dr.``, ``e.g.``, ``vs.``);
2. a short form of a numbered thing, and a digit follows (``No. 5``, ``pp. 3``, ``Jan. 1``);
3. an initial or a dotted or closing short form (``J. Bach``, ``U.S. Army``, ``Acme Inc. Press``), unless the
   next word is one that commonly opens a sentence (``in the U.S. The army``).

Decimals and version numbers (``3.14``) have no white space after the stop, so they need no rule. The
full-width terminators of Chinese and Japanese end a sentence without white space.

NSP pre-training needs boundaries that are mostly right, not perfect ones; what matters more is speed, so the
rules run only where one compiled expression has found a candidate.
"""

# ruff: noqa: RUF001, SIM905 (typographic quotes are what this file is about; word lists read best as text)
from __future__ import annotations

import re

_BOUNDARY = re.compile(
    r"""(?P<stop>[.!?…]+)          # terminators
        ["'”’»)\]}]*               # what closes after them
        (?:\[\d+\])*               # reference marks
        \s+
        (?=(?P<next>["'“‘«(\[{¿¡—–-]*\w+))
      | [。！？][”’」』）]*(?=\S)""",
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"[\w.’'-]*$")
_LONGEST_WORD = 24

_NEVER_END = frozenset(
    "mr mrs ms mx dr prof rev fr hon st mt ft gen col lt maj sgt capt cpl cmdr adm gov sen rep pres messrs "
    "mme mlle e.g i.e cf vs viz approx ca c b d fl esp incl".split()
)
_BEFORE_NUMBER = frozenset(
    "no nos nr p pp vol vols fig figs ch sec art eq op cap jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_MAY_END = frozenset("inc ltd co corp bros jr sr etc al dept univ est ave blvd rd hrs ph.d".split())
_OPENS = frozenset(
    "a after all also although an and as at because before both but by despite during each for from he her "
    "his how however if in it its many most no on one only other she since so some such that the their then "
    "there these they this those though to today under until we what when where which while with you".split()
)


def split_sentences(text: str) -> list[str]:
    """Split `text` into sentences, without surrounding white space and without empty ones.

    Joining the result with spaces gives back the text, up to white space.

    >>> split_sentences("Dr. J. Smith paid $3.50. He left at 5 p.m. on Jan. 3. Why?")
    ['Dr. J. Smith paid $3.50.', 'He left at 5 p.m. on Jan. 3.', 'Why?']
    >>> split_sentences('"Stop!" she cried. (Nobody did.) It joined the U.S. Army in the U.S. It won.')
    ['"Stop!" she cried.', '(Nobody did.)', 'It joined the U.S. Army in the U.S.', 'It won.']
    >>> split_sentences("It was ... odd. so it went on.[3] 1984 was worse!")
    ['It was ... odd. so it went on.[3]', '1984 was worse!']
    >>> split_sentences("  ")
    []
    """
    sentences = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        if match["stop"] is not None and not _ends_sentence(text, match):
            continue
        if sentence := text[start : match.end()].strip():
            sentences.append(sentence)
        start = match.end()
    if rest := text[start:].strip():
        sentences.append(rest)
    return sentences


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    following = match["next"].lstrip("\"'“‘«([{¿¡—–-")
    if following[0].islower():
        return False
    if match["stop"] != ".":
        return True
    stop = match.start()
    found = _LAST_WORD.search(text, max(0, stop - _LONGEST_WORD), stop)
    word = found[0].lstrip(".'’-") if found else ""
    lower = word.lower()
    if lower in _NEVER_END and not (len(word) == 1 and word.isupper()):
        return False
    if lower in _BEFORE_NUMBER and following[0].isdigit():
        return False
    # "I" is far more often a numeral or the pronoun than an initial.
    initial = len(word) == 1 and word.isupper() and word != "I"
    dotted = "." in word and all(len(part) == 1 for part in word.split("."))
    if initial or dotted or lower in _MAY_END:
        return following.lower() in _OPENS
    return True
