"""Claims that compare with dense models of equal FLOPs: C1, C2 and C7."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from regrow.study.analysis import Configuration, DenseFamily, along, difference
from regrow.study.claims.claim import Claim, exact, shown, signed
from regrow.study.claims.common import best_of_each, by_flops, same, sparse


def against_dense(best: Sequence[Configuration]) -> Claim:
    """C1: DynSparse and static against dense models, by FLOPs and by seconds."""
    claim = Claim(
        "C1",
        "DynSparse (s = 0.9, b = 1) lies on a better FLOPs/loss curve than dense BERT and static sparsity at every "
        "size; static matches dense.",
        ["size", "family", "loss", "minus dense at equal FLOPs", "FLOPs at equal loss", "seconds at equal loss", "eps"],
    )
    found = best_of_each([c for c in sparse(best, "dynsparse", "static") if _as_in_figure_3(c)])
    compared: set[str] = set()
    for c in by_flops(found):
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
    return by_flops(members.values())


def _as_in_figure_3(c: Configuration) -> bool:
    return c.get("block_size") == 1 and 0.08 <= c.get("density") <= 0.12


def _compare_methods(claim: Claim, found: Sequence[Configuration]) -> None:
    """DynSparse minus static at the same size."""
    for static in (c for c in found if c.get("method") == "static"):
        for dynamic in (
            c for c in found if c.get("method") == "dynsparse" and same(c, static, "size", "density", "steps")
        ):
            minus = difference(dynamic, static)
            claim.vote(minus, -1)
            claim.findings.append(f"{static.get('size')}: dynsparse minus static {signed(minus)}")


def over_sparsity(best: Sequence[Configuration]) -> Claim:
    """C2: against static and dense, from one sparsity to the next."""
    claim = Claim(
        "C2",
        "The gain over dense holds across sparsity 0.5 to 0.99.",
        ["size", "block", "sparsity", "loss", "minus static", "minus dense at equal FLOPs", "FLOPs at equal loss"],
    )
    for group in along(sparse(best, "dynsparse"), "density"):
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
    return next((c for c in sparse(best, "static") if same(c, like, *names)), None)


def block_size(best: Sequence[Configuration]) -> Claim:
    """C7: from one block size to the next, and against dense models."""
    claim = Claim(
        "C7",
        "Loss grows with block size, still below dense at equal FLOPs (at Base; at Medium b = 16 loses to dense).",
        ["size", "block", "sparsity", "loss", "dense at equal FLOPs", "minus dense", "FLOPs at equal loss",
         "seconds at equal loss", "eps"],
    )  # fmt: skip
    for group in along(sparse(best, "dynsparse"), "block_size"):
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
