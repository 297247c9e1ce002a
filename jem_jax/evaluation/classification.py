"""How well the classifier classifies."""

import numpy as np


def log_posterior(logits: np.ndarray) -> np.ndarray:
    """log softmax in float64. [N, K] -> [N, K]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of examples whose largest logit is the label's. [N, K], [N] -> fraction."""
    return float(np.mean(logits.argmax(axis=-1) == labels))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(y | x), in nats. [N, K], [N] -> nats."""
    return float(-log_posterior(logits)[np.arange(len(labels)), labels].mean())
