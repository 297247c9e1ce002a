"""Accuracy and its relatives: functions of logits [N, K] and labels [N]."""

import numpy as np


def log_posterior(logits: np.ndarray) -> np.ndarray:
    """log softmax in float64. [N, K] -> [N, K]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of examples whose largest logit is the label's. [N, K], [N] -> fraction.

    >>> accuracy(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
    0.5
    """
    return float(np.mean(logits.argmax(axis=-1) == labels))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(y | x), in nats. [N, K], [N] -> nats."""
    return float(-log_posterior(logits)[np.arange(len(labels)), labels].mean())


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of Σ_y (p(y | x) - [y is the label])², from 0 to 2 (Brier 1950). [N, K], [N] -> score."""
    probabilities = np.exp(log_posterior(logits))
    probabilities[np.arange(len(labels)), labels] -= 1
    return float((probabilities**2).sum(axis=-1).mean())


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many examples of each label (row) were taken for each class (column). [N, K], [N] -> int64 [K, K]."""
    classes = logits.shape[-1]
    pairs = labels.astype(np.int64) * classes + logits.argmax(axis=-1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def recall_and_precision(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of each class's examples that were found, and the share of its predictions that were right.

    Args:
      confusion: [K, K] counts, as `confusion_matrix` gives them.

    Returns:
      Two arrays [K] of fractions; NaN for a class with no example, or that was never predicted.
    """
    with np.errstate(invalid="ignore"):
        correct = np.diagonal(confusion)
        return correct / confusion.sum(axis=1), correct / confusion.sum(axis=0)
