"""Whether a classifier's confidence is the frequency of its being right (Guo et al. 2017).

Confidence is max_y p(y | x). Examples are put into bins by confidence, and the gap of a bin is its mean confidence
less its accuracy. All functions take logits [N, K] and labels [N].
"""

from typing import NamedTuple

import numpy as np

from jem_jax.evaluation.classification import log_posterior, negative_log_likelihood

_TEMPERATURES = (0.01, 100.0)


class Reliability(NamedTuple):
    """The points of a reliability diagram, bin by bin; NaN in an empty bin."""

    edges: np.ndarray
    """[bins + 1], increasing, from 0 to 1"""
    counts: np.ndarray
    """[bins] examples"""
    confidence: np.ndarray
    """[bins] mean confidence"""
    accuracy: np.ndarray
    """[bins] fraction that is right"""


class _Binned(NamedTuple):
    edges: np.ndarray
    bin_index: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False) -> Reliability:
    """Confidence and accuracy of each bin.

    Args:
      bins: how many.
      equal_mass: bins of (nearly) equally many examples, rather than of equal width (l, r].
    """
    binned = _binned(logits, labels, bins, equal_mass)
    counts = np.bincount(binned.bin_index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(binned.bin_index, weights=binned.confidence, minlength=bins) / counts
        correct = np.bincount(binned.bin_index, weights=binned.correct, minlength=bins) / counts
    return Reliability(binned.edges, counts, confidence, correct)


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False
) -> float:
    """ECE: the mean size of the bins' gaps, weighted by count. A fraction in [0, 1]; it depends on the bins.

    >>> logits = np.log(np.array([[0.75, 0.25], [0.75, 0.25]]))
    >>> round(expected_calibration_error(logits, np.array([0, 1])), 6)
    0.25
    """
    binned = _binned(logits, labels, bins, equal_mass)
    gaps = np.bincount(binned.bin_index, weights=binned.confidence - binned.correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def maximum_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """MCE: the largest gap of any bin of equal width that is not empty, however few examples are in it."""
    diagram = reliability(logits, labels, bins)
    return float(np.nanmax(np.abs(diagram.confidence - diagram.accuracy)))


def ece_interval(
    logits: np.ndarray, labels: np.ndarray, bins: int = 15, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """A percentile bootstrap interval of the ECE in equal-width bins: the test examples are drawn again and again.

    The ECE of few examples is biased upwards, and a resample's more so; the interval therefore lies rather high.
    """
    binned = _binned(logits, labels, bins, equal_mass=False)
    random = np.random.default_rng(seed)
    gap = binned.confidence - binned.correct
    values = np.empty(resamples)
    for i in range(resamples):
        rows = random.integers(0, len(gap), len(gap))
        values[i] = np.abs(np.bincount(binned.bin_index[rows], weights=gap[rows], minlength=bins)).sum() / len(gap)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature T in [0.01, 100] whose softmax(logits / T) has the smallest NLL on these examples.

    They must not be the test examples. Above 1 the classifier was overconfident, below 1 underconfident.

    Returns:
      T, or None where no T between the bounds is better than both. If all examples are classified correctly, their NLL
      falls towards 0 with T; if they are classified worse than by chance, it falls as T grows.
    """
    # Only here: every command would wait half a second for it.
    from scipy import optimize

    low, high = np.log(_TEMPERATURES)

    def nll(log_t: float) -> float:
        return negative_log_likelihood(logits / np.exp(log_t), labels)

    result = optimize.minimize_scalar(nll, bounds=(low, high), method="bounded")
    return float(np.exp(result.x)) if nll(result.x) < min(nll(low), nll(high)) else None


def _binned(logits: np.ndarray, labels: np.ndarray, bins: int, equal_mass: bool) -> _Binned:
    confidence = np.exp(log_posterior(logits).max(axis=-1))
    correct = (logits.argmax(axis=-1) == labels).astype(float)
    if equal_mass:
        rank = np.empty(len(labels), dtype=int)
        rank[np.argsort(confidence, kind="stable")] = np.arange(len(labels))
        bin_index = rank * bins // len(labels)
        edges = np.quantile(confidence, np.linspace(0, 1, bins + 1))
        edges[0], edges[-1] = 0, 1
    else:
        bin_index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        edges = np.linspace(0, 1, bins + 1)
    return _Binned(edges, bin_index, confidence, correct)
