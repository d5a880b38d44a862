"""What the runs at hand say about each claim of Dietrich et al. 2021 (arXiv 2108.06277).

A comparison counts only if its 95% interval over seeds leaves out zero. A claim is *supported* if all that count speak
for it, *contradicted* if all speak against, *mixed* if they disagree, *undecided* if none counts, and *no data* if
there is nothing to compare. Configurations are taken at their best learning rate among those tried.
"""

from __future__ import annotations

from collections.abc import Sequence

from regrow.nn.replace import DEFAULT
from regrow.study.analysis import Configuration, Tuned
from regrow.study.claims.choices import group_lasso, learning_rate, norms
from regrow.study.claims.claim import Claim
from regrow.study.claims.dense import against_dense, block_size, over_sparsity
from regrow.study.claims.gap import gap
from regrow.study.claims.masked import alternation, freezing
from regrow.study.claims.updates import collapse, exploration, schedule


def claims(tuned: Sequence[Tuned]) -> list[Claim]:
    """All claims, in order: the paper's, and what it leaves open."""
    best = [t.best for t in tuned]
    plain = [t for t in tuned if t.best.first.layer == DEFAULT]
    return [*_of_the_paper(plain, [t.best for t in plain]), gap(best)]


def _of_the_paper(tuned: Sequence[Tuned], best: Sequence[Configuration]) -> list[Claim]:
    return [
        against_dense(best),
        over_sparsity(best),
        schedule(best),
        exploration(best),
        norms(best),
        group_lasso(best),
        block_size(best),
        learning_rate(tuned),
        collapse(best),
        freezing(best),
        alternation(best),
    ]
