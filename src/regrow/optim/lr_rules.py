"""The learning rate that a sparsity asks for.

Source: Dietrich et al. 2021, arXiv 2108.06277, Eq. 3, 8 and appendix A.
"""

from __future__ import annotations

import math

from regrow.errors import RegrowError


def sparse_learning_rate(dense_lr: float, density: float) -> float:
    r"""Learning rate at a density from the dense optimum of the same model (Eq. 3).

    .. math:: \eta(s) = \eta(0)\, e^{1.969 s^2 + 0.2905 s}, \quad s = 1 - density

    Example:
        >>> [round(sparse_learning_rate(1.0, density), 2) for density in (1.0, 0.5, 0.25, 0.1, 0.01)]
        [1.0, 1.89, 3.76, 6.4, 9.18]
    """
    if dense_lr <= 0:
        raise RegrowError(f"the learning rate must be positive, got {dense_lr}")
    sparsity = 1.0 - density
    return dense_lr * math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)


def dense_learning_rate(n_parameters: int) -> float:
    r"""Dense optimum for a model of ``n_parameters`` encoder weights (Eq. 8): ``log lr = -0.44 log N - 0.47``.

    Example:
        >>> round(dense_learning_rate(12_580_000), 5)  # BERT-Small; the paper's own optimum is 4e-4
        0.00047
    """
    return math.exp(-0.44 * math.log(n_parameters) - 0.47)
