"""Claims about single choices of the recipe: block norm (C5), group lasso (C6) and learning rate (C8)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from regrow.errors import RegrowError
from regrow.optim import sparse_learning_rate
from regrow.study.analysis import Configuration, Tuned, along, difference
from regrow.study.claims.claim import Claim, shown, signed
from regrow.study.claims.common import mean_loss, sparse
from regrow.study.pareto import PAPER_LR_FIT, Estimate, fit_learning_rate_rule


def norms(best: Sequence[Configuration]) -> Claim:
    """C5: what ranks a block."""
    claim = Claim(
        "C5",
        "Ranking blocks by L1 gives a lower loss than L2, and L2 than Linf (paper: 2.608 / 2.620 / 2.635).",
        ["size", "block", "norm", "loss", "minus L1"],
    )
    order = ["l1", "l2", "linf"]
    for group in along(sparse(best, "dynsparse"), "norm", keep=lambda c: c.get("block_size") != 1):
        by_norm = {str(c.get("norm")): c for c in group}
        for norm, c in sorted(by_norm.items()):
            claim.point("block norm", f"b={c.get('block_size')} at {c.get('size')}", norm, c.loss)
            minus = difference(c, by_norm["l1"]) if norm != "l1" and "l1" in by_norm else None
            claim.row(c.get("size"), c.get("block_size"), norm, shown(c.loss), signed(minus))
        for better, worse in pairwise(order):
            if better in by_norm and worse in by_norm:
                claim.vote(difference(by_norm[better], by_norm[worse]), -1)
            else:
                claim.missing.append(f"both of {better} and {worse} at block {group[0].get('block_size')}")
    if not claim.rows:
        claim.missing.append("dynsparse with blocks above 1 and different --norm")
    return claim


def group_lasso(best: Sequence[Configuration]) -> Claim:
    """C6: group lasso against weight decay."""
    claim = Claim(
        "C6",
        "Group lasso does not beat weight decay.",
        ["size", "block", "group lasso", "weight decay", "loss", "minus best weight decay"],
    )
    for group in along(sparse(best, "dynsparse"), "group_lasso", "weight_decay"):
        with_lasso = [c for c in group if c.get("group_lasso")]
        without = [c for c in group if not c.get("group_lasso")]
        if not with_lasso or not without:
            continue
        base = min(without, key=mean_loss)
        for c in sorted(group, key=lambda c: (c.get("group_lasso") or 0, c.get("weight_decay") or 0)):
            minus = None if c is base else difference(c, base)
            penalties = c.get("group_lasso"), c.get("weight_decay")
            claim.row(c.get("size"), c.get("block_size"), *penalties, shown(c.loss), signed(minus))
        found = [difference(c, base) for c in with_lasso]
        # "does not beat": a lasso that is as good does not contradict it, one that is surely better does
        claim.votes.append(-1 if any(m is not None and m.sign < 0 for m in found) else _not_better(found))
    if not claim.rows:
        claim.missing.append("dynsparse with and without --group-lasso")
    return claim


def _not_better(found: Sequence[Estimate | None]) -> int:
    return 1 if any(m is not None and m.half_width is not None for m in found) else 0


def learning_rate(tuned: Sequence[Tuned]) -> Claim:
    """C8: the best learning rate against Eq. 3."""
    claim = Claim(
        "C8",
        "The best learning rate is eta(0) exp(1.969 s^2 + 0.2905 s), static and dynamic, unstructured and in blocks.",
        ["size", "family", "sparsity", "best rate", "over dense", "by the rule", "rates tried", "at the edge"],
    )
    searched = [t for t in tuned if len(t.tried) > 1]
    dense = {
        (t.best.get("size"), t.best.first.task): t.best.get("learning_rate") for t in searched if t.best.first.dense
    }
    pairs = []
    for t in (t for t in searched if not t.best.first.dense):
        c, s = t.best, 1 - t.best.get("density")
        base = dense.get((c.get("size"), c.first.task))
        rate = c.get("learning_rate")
        ratio = rate / base if base else None
        rule = _rule(s)
        at_edge = "yes" if t.at_edge else "no"
        claim.row(c.get("size"), c.first.family, c.sparsity, rate, ratio, rule, len(t.tried), at_edge)
        if ratio is None:
            claim.missing.append(f"dense {c.get('size')} at two or more learning rates")
        elif not t.at_edge:
            pairs.append((s, ratio))
            claim.votes.append(1 if 2 / 3 <= ratio / rule <= 1.5 else -1)
    if not claim.rows:
        claim.missing.append("sparse runs at two or more learning rates each")
    if any(t.at_edge for t in searched):
        claim.missing.append("learning rates beyond the edge of those tried, where the best is at an edge")
    try:
        fit = fit_learning_rate_rule(pairs, dense_lr=1.0)
    except RegrowError as error:
        claim.missing.append(str(error))
    else:
        a, b = PAPER_LR_FIT
        claim.findings.append(
            f"fit of {fit.n} optima: exp({fit.a:.3f} s^2 + {fit.b:.3f} s), error {fit.residual:.3f} in log; "
            f"paper: {a}, {b}"
        )
    return claim


def _rule(sparsity: float) -> float:

    return sparse_learning_rate(1.0, 1 - sparsity)
