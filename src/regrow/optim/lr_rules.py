"""The learning rate that a sparsity asks for."""

from __future__ import annotations

import math
from typing import Literal

from regrow.entries import listed
from regrow.errors import RegrowError

LrRule = Literal["eq3", "inverse", "supar", "none"]


@listed(
    "rule",
    "eq3",
    paper="Dietrich et al., Towards Structured Dynamic Sparse Pre-Training of BERT",
    year=2021,
    link="https://arxiv.org/abs/2108.06277",
    always_sparse=True,
    command="regrow pretrain --lr-rule eq3",
    does="Raise the learning rate of sparse weights by a fit over densities; inverse is another, 1 / density.",
)
def sparse_learning_rate(dense_lr: float, density: float, rule: LrRule = "eq3", *, width_ratio: float = 1.0) -> float:
    r"""Learning rate of weights at a density from the dense optimum of the same model.

    * ``eq3``: :math:`\eta\, e^{1.969 s^2 + 0.2905 s}` with s = 1 - rho, a fit (Dietrich et al. 2021, arXiv 2108.06277);
    * ``inverse``: :math:`\eta / \rho` (SMET, arXiv 2606.00888, uses about 5e-4 / rho);
    * ``supar``: :math:`\eta / (m \rho)`, sparse maximal update parametrisation, which goes with an initial deviation of
      :func:`supar_init_factor` times the dense one;
    * ``none``: :math:`\eta`.

    Args:
        dense_lr: eta.
        density: rho, in (0, 1].
        width_ratio: ``m``, the model's width over that of the model ``dense_lr`` was tuned on; only ``supar`` uses it.

    Raises:
        RegrowError: a number is not positive, or the rule is unknown.

    Example:
        >>> [round(sparse_learning_rate(1.0, density), 2) for density in (1.0, 0.5, 0.25, 0.1, 0.01)]
        [1.0, 1.89, 3.76, 6.4, 9.18]
        >>> sparse_learning_rate(1.0, 0.1, "inverse"), sparse_learning_rate(1.0, 0.1, "supar", width_ratio=2.0)
        (10.0, 5.0)
    """
    for name, value in (("the learning rate", dense_lr), ("density", density), ("width_ratio", width_ratio)):
        if not value > 0:
            raise RegrowError(f"{name} must be positive, got {value}")
    if rule == "eq3":
        sparsity = 1.0 - density
        return dense_lr * math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)
    if rule == "inverse":
        return dense_lr / density
    if rule == "supar":
        return dense_lr / (width_ratio * density)
    if rule == "none":
        return dense_lr
    raise RegrowError(f"unknown learning-rate rule {rule!r}; choose one of eq3, inverse, supar, none")


@listed(
    "rule",
    "supar",
    paper="Dey et al., Sparse maximal update parameterization: A holistic approach to sparse training dynamics",
    year=2024,
    link="https://arxiv.org/abs/2405.15743",
    always_sparse=True,
    command="regrow pretrain --lr-rule supar",
    does="Learning rate and initial deviation of sparse weights such that no signal's size depends on the density.",
)
def supar_init_factor(density: float, width_ratio: float = 1.0) -> float:
    r"""What SuPar multiplies the dense initial standard deviation of a sparse weight by: :math:`1 / \sqrt{m \rho}`.

    A sparse row sums ``rho`` times as many products; so the variance of its output does not depend on ``rho``.

    Example:
        >>> supar_init_factor(0.25)
        2.0
    """
    return 1.0 / math.sqrt(width_ratio * density)


def dense_learning_rate(n_parameters: int) -> float:
    r"""Dense optimum for a model of ``n_parameters`` encoder weights (Eq. 8): ``log lr = -0.44 log N - 0.47``.

    Example:
        >>> round(dense_learning_rate(12_580_000), 5)  # BERT-Small; the paper's own optimum is 4e-4
        0.00047
    """
    return math.exp(-0.44 * math.log(n_parameters) - 0.47)
