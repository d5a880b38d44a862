"""What the runs at hand say about each claim of Dietrich et al. 2021 (arXiv 2108.06277).

A comparison counts only if its 95% interval over seeds leaves out zero. A claim is *supported* if all that count speak
for it, *contradicted* if all speak against, *mixed* if they disagree, *undecided* if none counts, and *no data* if
there is nothing to compare. Configurations are taken at their best learning rate among those tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from regrow.errors import RegrowError
from regrow.study.analysis import Configuration, DenseFamily, Tuned, along, difference, spearman
from regrow.study.claim import Claim, exact, shown, signed
from regrow.study.claims_masked import alternation, freezing
from regrow.study.pareto import PAPER_LR_FIT, Estimate, fit_learning_rate_rule
from regrow.study.pictures import spread


def claims(tuned: Sequence[Tuned]) -> list[Claim]:
    """All claims, in order."""
    best = [t.best for t in tuned]
    return [
        _against_dense(best),
        _over_sparsity(best),
        _schedule(best),
        _exploration(best),
        _norms(best),
        _group_lasso(best),
        _block_size(best),
        _learning_rate(tuned),
        _collapse(best),
        freezing(best),
        alternation(best),
    ]


def _sparse(best: Iterable[Configuration], *methods: str) -> list[Configuration]:
    return [c for c in best if not c.first.dense and (not methods or c.get("method") in methods)]


def _by_flops(found: Iterable[Configuration]) -> list[Configuration]:
    return sorted(found, key=lambda c: (c.flops or 0.0, c.first.family))


def _mean_loss(c: Configuration) -> float:
    return c.loss.mean if c.loss else float("inf")


def _against_dense(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C1",
        "DynSparse (s = 0.9, b = 1) lies on a better FLOPs/loss curve than dense BERT and static sparsity at every "
        "size; static matches dense.",
        ["size", "family", "loss", "minus dense at equal FLOPs", "FLOPs at equal loss", "seconds at equal loss", "eps"],
    )
    found = _best_of_each([c for c in _sparse(best, "dynsparse", "static") if _as_in_figure_3(c)])
    compared: set[str] = set()
    for c in _by_flops(found):
        family = DenseFamily(best, c)
        minus = family.difference()
        at_equal_loss = family.reduction(), family.reduction("seconds")
        claim.row(c.get("size"), c.first.family, shown(c.loss), signed(minus), *at_equal_loss, family.eps())
        for axis, cost in _COSTS.items():
            claim.point(axis, str(c.get("method")), getattr(c, cost), c.loss)
        if minus is None:
            claim.missing.append(f"dense sizes whose FLOPs enclose those of {c.first.family} at {c.get('size')}")
        elif c.get("method") == "dynsparse":
            claim.vote(minus, -1)
            compared.add(str(c.get("size")))
        elif minus.sign:
            claim.findings.append(f"static at {c.get('size')} is {signed(minus)} from dense at equal FLOPs")
    if not found:
        claim.missing.append("runs of dynsparse and static with density 0.1 and block size 1")
    elif compared:
        claim.findings.append(
            f"compared at {len(compared)} of the paper's 4 or more sizes: {', '.join(sorted(compared))}"
        )
    _compare_methods(claim, found)
    for c in _dense_beside(best, found):
        for axis, cost in _COSTS.items():
            claim.point(axis, "dense", getattr(c, cost), c.loss)
    return claim


_COSTS = {"training FLOPs": "flops", "training seconds": "seconds"}


def _dense_beside(best: Sequence[Configuration], found: Sequence[Configuration]) -> list[Configuration]:
    """The dense configurations that any of these is compared with."""
    members = {id(m): m for c in found for m in DenseFamily(best, c).members}
    return _by_flops(members.values())


def _as_in_figure_3(c: Configuration) -> bool:
    return c.get("block_size") == 1 and 0.08 <= c.get("density") <= 0.12


def _best_of_each(found: Iterable[Configuration]) -> list[Configuration]:
    """The lowest mean loss of each method, size and length of training: other settings were other questions."""
    lowest: dict[object, Configuration] = {}
    for c in sorted(found, key=_mean_loss):
        lowest.setdefault((c.get("method"), c.get("size"), c.get("steps"), c.first.task), c)
    return list(lowest.values())


def _compare_methods(claim: Claim, found: Sequence[Configuration]) -> None:
    """DynSparse minus static at the same size."""
    for static in (c for c in found if c.get("method") == "static"):
        for dynamic in (
            c for c in found if c.get("method") == "dynsparse" and _same(c, static, "size", "density", "steps")
        ):
            minus = difference(dynamic, static)
            claim.vote(minus, -1)
            claim.findings.append(f"{static.get('size')}: dynsparse minus static {signed(minus)}")


def _same(a: Configuration, b: Configuration, *names: str) -> bool:
    return a.first.task == b.first.task and all(a.get(name) == b.get(name) for name in names)


def _over_sparsity(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C2",
        "The gain over dense holds across sparsity 0.5 to 0.99.",
        ["size", "block", "sparsity", "loss", "minus static", "minus dense at equal FLOPs", "FLOPs at equal loss"],
    )
    for group in along(_sparse(best, "dynsparse"), "density"):
        for c in sorted(group, key=lambda c: -c.get("density")):
            family, sparsity = DenseFamily(best, c), c.sparsity
            minus, static = family.difference(), _static_like(best, c)
            over_static = difference(c, static) if static else None
            against_dense = signed(minus), family.reduction()
            claim.row(c.get("size"), c.get("block_size"), sparsity, shown(c.loss), signed(over_static), *against_dense)
            claim.point("sparsity", "dynsparse", sparsity, c.loss)
            claim.point("sparsity", "static", sparsity, static.loss if static else None)
            claim.point("sparsity", "dense at equal FLOPs", sparsity, exact(family.loss()))
            claim.vote(over_static, -1)
            if minus is None:
                claim.missing.append(f"dense sizes whose FLOPs enclose those of s = {sparsity} at {c.get('size')}")
            elif 0.49 <= sparsity <= 0.991:
                claim.vote(minus, -1)
    if not claim.rows:
        claim.missing.append("dynsparse at two or more densities and otherwise the same")
    return claim


def _static_like(best: Iterable[Configuration], like: Configuration) -> Configuration | None:
    names = ("size", "density", "block_size", "steps", "distribution")
    return next((c for c in _sparse(best, "static") if _same(c, like, *names)), None)


def _schedule(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C3",
        "The number of updates n and the share pr of blocks moved have an optimum.",
        ["size", "block", "sparsity", "what varies", "value", "loss", "minus the best"],
    )
    for name, title in (("n_updates", "n"), ("drop_fraction", "pr")):
        groups = along(_sparse(best), name, keep=lambda c: c.get("method") != "static")
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
    best = min(group, key=_mean_loss)
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


def _exploration(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C4",
        "The best runs explore almost all weights and throw away few fresh ones.",
        ["size", "family", "n", "pr", "loss", "coverage", "fresh removed"],
        joined=False,
    )
    moving = [c for c in _sparse(best) if c.coverage is not None and c.get("method") != "static"]
    for group in along(moving, "n_updates", "drop_fraction"):
        group = sorted(group, key=_mean_loss)
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


def _norms(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C5",
        "Ranking blocks by L1 gives a lower loss than L2, and L2 than Linf (paper: 2.608 / 2.620 / 2.635).",
        ["size", "block", "norm", "loss", "minus L1"],
    )
    order = ["l1", "l2", "linf"]
    for group in along(_sparse(best, "dynsparse"), "norm", keep=lambda c: c.get("block_size") != 1):
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


def _group_lasso(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C6",
        "Group lasso does not beat weight decay.",
        ["size", "block", "group lasso", "weight decay", "loss", "minus best weight decay"],
    )
    for group in along(_sparse(best, "dynsparse"), "group_lasso", "weight_decay"):
        with_lasso = [c for c in group if c.get("group_lasso")]
        without = [c for c in group if not c.get("group_lasso")]
        if not with_lasso or not without:
            continue
        base = min(without, key=_mean_loss)
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


def _block_size(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C7",
        "Loss grows with block size, still below dense at equal FLOPs (at Base; at Medium b = 16 loses to dense).",
        ["size", "block", "sparsity", "loss", "dense at equal FLOPs", "minus dense", "FLOPs at equal loss",
         "seconds at equal loss", "eps"],
    )  # fmt: skip
    for group in along(_sparse(best, "dynsparse"), "block_size"):
        group = sorted(group, key=lambda c: c.get("block_size") or 0)
        for c in group:
            family = DenseFamily(best, c)
            minus = family.difference()
            against_dense = family.loss(), signed(minus), family.reduction(), family.reduction("seconds")
            claim.row(c.get("size"), c.get("block_size"), c.sparsity, shown(c.loss), *against_dense, family.eps())
            claim.point("block edge", f"{c.get('method')} at {c.get('size')}", c.get("block_size"), c.loss)
            claim.point("block edge", "dense at equal FLOPs", c.get("block_size"), exact(family.loss()))
            if minus is None:
                claim.missing.append(f"dense sizes whose FLOPs enclose those of block {c.get('block_size')}")
            elif minus.sign:
                side = "below" if minus.sign < 0 else "above"
                claim.findings.append(f"block {c.get('block_size')} at {c.get('size')} is {side} dense at equal FLOPs")
        for small, large in pairwise(group):
            claim.vote(difference(large, small), 1)
    if not claim.rows:
        claim.missing.append("dynsparse at two or more block sizes and otherwise the same")
    return claim


def _learning_rate(tuned: Sequence[Tuned]) -> Claim:
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
    from regrow.optim import sparse_learning_rate

    return sparse_learning_rate(1.0, 1 - sparsity)


def _collapse(best: Sequence[Configuration]) -> Claim:
    claim = Claim(
        "C9",
        "Growth by gradient (RigL) collapses the explored space along the input dimension; random growth does not.",
        ["size", "family", "loss", "coverage", "input spread", "output spread"],
        joined=False,
    )
    for group in along(_sparse(best, "dynsparse", "rigl"), methods=True):
        by_method = {str(c.get("method")): c for c in _best_of_each(group)}
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
