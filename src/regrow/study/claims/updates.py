"""Claims about how the pattern moves: C3, C4 and C9."""

from __future__ import annotations

from collections.abc import Sequence

from regrow.study.analysis import Configuration, along, difference, spearman
from regrow.study.claims.claim import Claim, shown, signed
from regrow.study.claims.common import best_of_each, mean_loss, sparse
from regrow.study.pictures import spread


def schedule(best: Sequence[Configuration]) -> Claim:
    """C3: how often, and how much."""
    claim = Claim(
        "C3",
        "The number of updates n and the share pr of blocks moved have an optimum.",
        ["size", "block", "sparsity", "what varies", "value", "loss", "minus the best"],
    )
    for name, title in (("n_updates", "n"), ("drop_fraction", "pr")):
        groups = along(sparse(best), name, keep=lambda c: c.get("method") != "static")
        for group in groups:
            _axis(claim, group, name, title)
        if not groups:
            claim.missing.append(f"runs that differ only in {name}")
        elif all(len(group) < 3 for group in groups):
            claim.missing.append(f"a third value of {name}: an optimum needs a neighbour on each side")
    return claim


def _axis(claim: Claim, group: Sequence[Configuration], name: str, title: str) -> None:
    """The best along an axis; two votes, one for each neighbour being worse."""
    group = sorted(group, key=lambda c: c.get(name) or 0)
    best = min(group, key=mean_loss)
    for c in group:
        minus = None if c is best else difference(c, best)
        claim.row(c.get("size"), c.get("block_size"), c.sparsity, title, c.get(name), shown(c.loss), signed(minus))
        claim.point(title, f"{c.first.family} at {c.get('size')}", c.get(name), c.loss)
    at = group.index(best)
    if 0 < at < len(group) - 1:
        for other in (group[0], group[-1]):
            claim.vote(difference(other, best), 1)
        claim.findings.append(f"{title} = {best.get(name):g} is best, inside the values tried")
    else:
        claim.votes.append(0)
        claim.findings.append(f"{title} = {best.get(name):g} is best, at the edge of the values tried")


def exploration(best: Sequence[Configuration]) -> Claim:
    """C4: loss against the explored share, from schedule to schedule."""
    claim = Claim(
        "C4",
        "The best runs explore almost all weights and throw away few fresh ones.",
        ["size", "family", "n", "pr", "loss", "coverage", "fresh removed"],
        joined=False,
    )
    moving = [c for c in sparse(best) if c.coverage is not None and c.get("method") != "static"]
    for group in along(moving, "n_updates", "drop_fraction"):
        group = sorted(group, key=mean_loss)
        for c in group:
            schedule = c.get("n_updates"), c.get("drop_fraction")
            claim.row(c.get("size"), c.first.family, *schedule, shown(c.loss), c.coverage, c.fresh_removed)
            series = f"{c.first.family} at {c.get('size')}"
            claim.point("explored share", series, c.coverage, c.loss)
            claim.point("fresh among the removed", series, c.fresh_removed, c.loss)
        pairs = [(c.coverage, c.loss.mean) for c in group if c.coverage is not None and c.loss]
        rank = spearman(pairs)
        if rank is not None:
            first = f"{group[0].first.family} at {group[0].get('size')}"
            claim.findings.append(
                f"{first}: rank correlation of coverage and loss {rank:+.2f} over {len(pairs)} schedules"
            )
            # a rank correlation of few schedules is weak evidence: it decides only together with the best run itself
            good, explored = group[0].coverage or 0.0, max(c.coverage or 0.0 for c in group)
            claim.votes.append(1 if rank < -0.5 and good > 0.9 * explored else -1 if rank > 0.5 else 0)
    if not claim.rows:
        claim.missing.append("runs with topology logs that differ only in n_updates or drop_fraction")
    return claim


def collapse(best: Sequence[Configuration]) -> Claim:
    """C9: growth by the gradient against random growth."""
    claim = Claim(
        "C9",
        "Growth by gradient (RigL) collapses the explored space along the input dimension; random growth does not.",
        ["size", "family", "loss", "coverage", "input spread", "output spread"],
        joined=False,
    )
    for group in along(sparse(best, "dynsparse", "rigl"), methods=True):
        by_method = {str(c.get("method")): c for c in best_of_each(group)}
        for c in by_method.values():
            inputs, outputs = spread(c.runs)
            claim.row(c.get("size"), c.first.family, shown(c.loss), c.coverage, inputs, outputs)
            claim.point("explored share", str(c.get("method")), c.coverage, c.loss)
        if len(by_method) == 2:
            _collapses(claim, by_method["rigl"], by_method["dynsparse"])
    if not any("coverage" in text for text in claim.findings):
        claim.missing.append("rigl and dynsparse with topology logs and otherwise the same")
    return claim


def _collapses(claim: Claim, rigl: Configuration, random: Configuration) -> None:
    """Less coverage, and the pattern gathers on few inputs rather than on few outputs."""
    if not rigl.coverage or not random.coverage:
        return
    coverage = rigl.coverage / random.coverage
    told = f"{rigl.get('size')}: with rigl coverage is {coverage:.2f} of that with random growth"
    (rigl_in, rigl_out), (random_in, random_out) = spread(rigl.runs), spread(random.runs)
    along_inputs = False
    if rigl_in and rigl_out and random_in and random_out:
        inputs, outputs = rigl_in / random_in, rigl_out / random_out
        told += f", the spread over inputs {inputs:.2f}, over outputs {outputs:.2f}"
        along_inputs = inputs < min(outputs, 0.9)
    else:
        claim.missing.append("pattern pictures of both methods, to tell input from output dimension")
    claim.findings.append(told)
    claim.votes.append(-1 if coverage >= 0.9 else int(along_inputs))
