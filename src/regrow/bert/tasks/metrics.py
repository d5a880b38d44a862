"""Scores of predictions: scikit-learn's and SciPy's, under GLUE's names, and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

from regrow.errors import RegrowError

CLASSIFICATION_METRICS = ("accuracy", "macro_f1")
REGRESSION_METRICS = ("spearman", "pearson", "mse")

_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predicted: f1_score(labels, predicted, zero_division=0.0),
    "macro_f1": lambda labels, predicted: f1_score(labels, predicted, average="macro", zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: _correlation(pearsonr, labels, predicted),
    "spearman": lambda labels, predicted: _correlation(spearmanr, labels, predicted),
    "mse": mean_squared_error,
}


def task_metrics(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of a model's outputs.

    Args:
        names: some of accuracy, f1 (of class 1), macro_f1, matthews, pearson, spearman, mse.
        logits: [n, classes]; or [n] predicted scores.
        labels: [n] numbers of classes, or scores.

    For classes, ``ece`` is added: see :func:`expected_calibration_error`.

    Raises:
        RegrowError: there is nothing to score.

    Example:
        >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
        >>> metrics = task_metrics(["accuracy", "f1", "matthews"], logits, np.array([0, 1, 1, 1]))
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.577, 'ece': 0.157}
    """
    if len(labels) == 0:
        raise RegrowError("there are no examples to score")
    predicted = logits.argmax(-1) if logits.ndim == 2 else logits
    metrics = {name: float(_METRICS[name](labels, predicted)) for name in names}
    if logits.ndim == 2:
        metrics["ece"] = expected_calibration_error(softmax(logits.astype(np.float64), -1), labels)
    return metrics


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    r"""How far confidence is from accuracy, on average:

    .. math:: \text{ECE} = \sum_{m} \frac{|B_m|}{n} \left| \text{acc}(B_m) - \text{conf}(B_m) \right|

    over bins ``B_m`` of equal width of the confidence, the probability of the predicted class.

    Args:
        probabilities: [n, classes].
        labels: [n] numbers of classes.
        bins: how many.

    Example:
        >>> p = np.array([[0.9, 0.1], [0.9, 0.1]])
        >>> round(expected_calibration_error(p, np.array([0, 1])), 3)
        0.4

    Reference: Guo et al. 2017, *On Calibration of Modern Neural Networks*, https://arxiv.org/abs/1706.04599.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def _correlation(function: Callable, labels: np.ndarray, predicted: np.ndarray) -> float:
    """0 where one of both never changes: there is no correlation to speak of."""
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(function(labels, predicted).statistic)
