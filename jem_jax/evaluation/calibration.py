"""Whether a classifier's confidence is the frequency of its being right (Guo et al. 2017)."""

import numpy as np

from jem_jax.evaluation.classification import log_posterior


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """ECE: the mean gap of confidence and accuracy over equal-width bins (l, r] of confidence, weighted by count.

    Args:
      logits: [N, K].
      labels: [N].
      bins: the number of bins; the value depends on it.

    Returns:
      A fraction in [0, 1].
    """
    confidence = np.exp(log_posterior(logits).max(axis=-1))
    right = logits.argmax(axis=-1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
