"""How much of a model there is, on the mean over its training."""

from __future__ import annotations

from itertools import pairwise

from regrow.methods import DenseLayoutMethod, Method
from regrow.training.schedule import UpdateSchedule


def mean_density(method: Method, schedule: UpdateSchedule, start: float) -> float | None:
    r"""The density of a training, averaged over its steps: :math:`\bar\rho = \frac1T \sum_{t=1}^T \rho_t`.

    ``rho_t`` is the share of all blocks that step ``t`` computes with, to whole blocks. An update after step ``t``
    counts from step ``t + 1`` on. Masked dense weights (``acdc``) count where they are not zero: all of them in a dense
    phase, and also if those that do not train are frozen.

    Args:
        method: its plan, :meth:`regrow.methods.Method.density_at`.
        schedule: when it updates.
        start: density the training begins with, in (0, 1]; for masked dense weights that of their sparse phases.

    Returns:
        A density in (0, 1], or ``None`` if the method cannot say beforehand.

    Example, 300 of 400 steps at .5 and the rest at .2:
        >>> from regrow.methods import create
        >>> gmp = create("gmp", final_density=0.2, begin=0.5, end=0.75)
        >>> mean_density(gmp, UpdateSchedule(total_steps=400, n_updates=4), start=0.5)
        0.425
        >>> mean_density(create("static"), UpdateSchedule(total_steps=400, n_updates=4), start=0.5)
        0.5
    """
    total = schedule.total_steps
    if isinstance(method, DenseLayoutMethod):
        sparse = sum(method.phase(schedule, step) is not None for step in range(total))
        return 1.0 if method.unused == "freeze" else (total - sparse + start * sparse) / total
    updates = [step for step in range(1, total) if schedule.is_update(step)]
    weighed = 0.0
    for before, after in pairwise([0, *updates, total]):
        density = start if before == 0 else method.density_at(before / total, start)
        if density is None:
            return None
        weighed += (after - before) * density
    return weighed / total
