"""What closes the loss gap of large blocks: ways to grow and layer options, at the FLOPs of plain random growth.

The paper leaves this open, so it is a claim of this library's, not of the paper's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from regrow.nn.replace import DEFAULT
from regrow.study.analysis import Configuration, DenseFamily, along, difference
from regrow.study.claims.claim import Claim, shown, signed
from regrow.study.claims.common import by_flops, same, sparse
from regrow.study.runs import TRAINING_FIELDS

_EQUAL = 1.25
"""FLOPs count as equal up to such a ratio."""


def gap(best: Sequence[Configuration]) -> Claim:
    """Everything else of the same block, beside dynsparse with large blocks and with single weights."""
    claim = Claim(
        "Gap",
        "A layer option or a growth rule closes what large blocks lose against single weights, at equal FLOPs (the "
        "paper leaves that open).",
        ["size", "block", "what", "FLOPs", "loss", "minus large blocks", "minus single weights",
         "minus dense at equal FLOPs"],
    )  # fmt: skip
    plain = [c for c in sparse(best, "dynsparse") if c.first.layer == DEFAULT]
    others = [c for c in sparse(best) if c.first.layer != DEFAULT or c.get("method") not in ("dynsparse", "static")]
    for group in along(plain, "block_size"):
        single = next((c for c in group if c.get("block_size") == 1), None)
        for large in group:
            beside = [c for c in others if _comparable(c, large)]
            if single is not None and large is not single and beside:
                _compare(claim, single, large, beside, best)
    if not claim.rows:
        claim.missing.append("dynsparse with blocks of 1 and of more, and other methods or layers with those blocks")
    return claim


def _compare(
    claim: Claim,
    single: Configuration,
    large: Configuration,
    beside: Sequence[Configuration],
    best: Sequence[Configuration],
) -> None:
    """Rows of a block size, and one vote: for, if anything of equal FLOPs beats it and is no worse than ``single``."""
    names = labels(beside)
    labelled = [(single, "dynsparse, b = 1"), (large, "dynsparse"), *((c, names[id(c)]) for c in by_flops(beside))]
    votes = []
    for c, name in labelled:
        over_large, over_single = (difference(c, other) if c is not other else None for other in (large, single))
        ratio = (c.flops or 0.0) / (large.flops or 1.0)
        minus_dense = DenseFamily(best, c).difference()
        cells = shown(c.loss), signed(over_large), signed(over_single), signed(minus_dense)
        claim.row(c.get("size"), c.get("block_size"), name, f"{ratio:.2f}x", *cells)
        if over_large is None or over_single is None or c is single:
            continue
        closes = over_large.sign < 0 and over_single.sign <= 0
        if ratio > _EQUAL:
            if closes:
                claim.findings.append(f"{name} closes the gap, but at {ratio:.1f} times the FLOPs")
            continue
        votes.append(1 if closes else -1 if over_single.sign > 0 else 0)
        if over_large.sign < 0:
            share = over_large.mean / (over_large.mean - over_single.mean)
            claim.findings.append(f"{name} closes {share:.0%} of the gap of blocks of {large.get('block_size')}")
    claim.votes.append(max(votes, default=0))


def labels(found: Iterable[Configuration]) -> Mapping[int, str]:
    """A name for each, by ``id``: its layer or method, and its own options and densities in which namesakes differ."""
    namesakes: dict[str, list[Configuration]] = defaultdict(list)
    for c in found:
        namesakes[c.first.method if c.first.layer == DEFAULT else c.first.layer].append(c)
    names = {}
    for name, group in namesakes.items():
        values: dict[str, set[str]] = defaultdict(set)
        for c in group:
            for option in c.first.config.keys() - TRAINING_FIELDS | {"density", "distribution"}:
                values[option].add(json.dumps(c.get(option)))
        telling = sorted(option for option, different in values.items() if len(different) > 1)
        for c in group:
            names[id(c)] = ", ".join([name, *(f"{option} = {c.get(option)}" for option in telling)])
    return names


def _comparable(c: Configuration, large: Configuration) -> bool:
    """Trained as long on the same, with the same block, and as large or as costly."""
    if not same(c, large, "block_size", "steps", "batch_size"):
        return False
    flops, other = c.flops or 0.0, large.flops or 0.0
    return c.get("size") == large.get("size") or other / _EQUAL <= flops <= other * _EQUAL
