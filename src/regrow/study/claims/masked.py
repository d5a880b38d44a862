"""The claims about dense weights of which a part does not train: C10 and C11, with runs of method ``acdc``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from regrow.study.analysis import Configuration, along, difference
from regrow.study.claims.claim import Claim, shown, signed

SAME = 0.05
"""Nats. "The same loss" is a difference whose whole 95% interval is smaller."""


def freezing(best: Sequence[Configuration]) -> Claim:
    """C10: zeroing against freezing at each time of the switch, and the times against each other."""
    claim = Claim(
        "C10",
        "Zeroed weights and frozen non-zero weights give the same loss; when the freezing happens hardly matters.",
        ["size", "sparsity", "dense until", "unused", "loss", "minus zeroed", "minus first"],
    )
    switched = [c for c in _acdc(best) if c.get("dense_until") is not None]
    for group in along(switched, "unused", "dense_until"):
        by_time = sorted(group, key=lambda c: (c.get("unused") != "zero", c.get("dense_until")))
        zeroed = {c.get("dense_until"): c for c in by_time if c.get("unused") == "zero"}
        first = {c.get("unused"): c for c in reversed(by_time)}
        for c in by_time:
            unused, time = c.get("unused"), c.get("dense_until")
            over_zero = difference(c, zeroed[time]) if unused != "zero" and time in zeroed else None
            over_first = difference(c, first[unused]) if c is not first[unused] else None
            differences = signed(over_zero), signed(over_first)
            claim.row(c.get("size"), c.sparsity, time, unused, shown(c.loss), *differences)
            claim.point("share that is dense first", str(unused), time, c.loss)
            for found in (over_zero, over_first):
                claim.vote_same(found, SAME)
    if not claim.rows:
        claim.missing.append("acdc with --dense-until and both of --unused zero and freeze")
    return claim


def alternation(best: Sequence[Configuration]) -> Claim:
    """C11: the choice of what a sparse phase trains, for zeroing and for freezing."""
    claim = Claim(
        "C11",
        "Alternating dense and sparse: with zeroing, magnitude beats fixed and random; with freezing, random is best.",
        ["size", "sparsity", "unused", "selection", "loss", "minus magnitude"],
    )
    order = {"zero": ["magnitude", "fixed", "random"], "freeze": ["random", "magnitude"]}
    for group in along([c for c in _acdc(best) if c.get("dense_until") is None], "selection"):
        by_selection = {str(c.get("selection")): c for c in group}
        magnitude, unused = by_selection.get("magnitude"), str(group[0].get("unused"))
        for selection, c in sorted(by_selection.items()):
            minus = difference(c, magnitude) if magnitude is not None and c is not magnitude else None
            claim.row(c.get("size"), c.sparsity, unused, selection, shown(c.loss), signed(minus))
            claim.point("what a sparse phase trains", unused, selection, c.loss)
        for better, worse in pairwise(order[unused]):
            if better in by_selection and worse in by_selection:
                claim.vote(difference(by_selection[better], by_selection[worse]), -1)
    if not claim.rows:
        claim.missing.append("acdc without --dense-until and with different --selection")
    return claim


def _acdc(best: Iterable[Configuration]) -> list[Configuration]:
    return [c for c in best if c.get("method") == "acdc"]
