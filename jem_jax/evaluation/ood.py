"""Out-of-distribution detection: scores of an image, and how well they tell two sets apart (section 5.3 of the paper).

A score is higher for images that look like the training data. It detects by a threshold, so everything here depends
on the order of scores alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy, sgld

Array = jax.Array

SCORES: Mapping[str, str] = {
    "log_density": "log p~(x)",
    "max_posterior": "max log p(y|x)",
    "approximate_mass": "-|∇ log p~(x)|",
    "max_logit": "max f(x)[y]",
    "refine": "log p~(x) - log p~(x′)",
    "refine_gradient": "|∇ log p~(x′)| - |∇ log p~(x)|",
    "refine_distance": "-|x - x′|",
}
"""Every score and its formula; x′ is x after a short SGLD chain (`--score_fn` of the official code)."""


class Detection(NamedTuple):
    """The separation of in-distribution from out-of-distribution images by a score."""

    auroc: float
    """probability that an inside image scores higher than an outside one, ties counted half"""
    aupr: float
    """average precision with the inside images as the positive class; chance is their share"""
    fpr95: float
    """share of outside images let in by the threshold that lets in at least 95 % of the inside ones"""
    not_finite: int
    """scores that were NaN; they count as the lowest there is"""


def scores(
    key: Array,
    logits_fn: energy.LogitsFunction,
    x: Array,
    *,
    chain_logits_fn: energy.LogitsFunction | None = None,
    num_steps: int = 20,
    step_size: float = 1.0,
    noise_std: float = 0.01,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> dict[str, Array]:
    """All `SCORES` of images, by any classifier.

    >>> found = scores(jax.random.key(0), lambda x: x, jnp.array([[3.0, 4.0]]), num_steps=0)
    >>> round(float(found["log_density"][0]), 4), float(found["max_logit"][0])
    (4.3133, 4.0)

    Args:
      key: one PRNG key, or one per example [B].
      logits_fn: x [B, ...] -> logits [B, K].
      x: [B, ...].
      chain_logits_fn: the logits whose log p~ the chain follows, where they are others than `logits_fn`'s: batch
        statistics instead of running ones.
      num_steps, step_size, noise_std, grad_clip, bounds: of the chain that leads from x to x′, as in `sgld.chain`
        (official defaults 20, 1, 0.01, no clipping).

    Returns:
      A score [B] float32 under each name.
    """
    refined = sgld.chain(
        key, energy.marginal(chain_logits_fn or logits_fn), x,
        num_steps=num_steps, step_size=step_size, noise_std=noise_std, grad_clip=grad_clip, bounds=bounds,
    )  # fmt: skip

    def describe(x: Array) -> tuple[Array, Array, Array]:
        def total(x: Array) -> tuple[Array, Array]:
            logits = logits_fn(x)
            return energy.log_density(logits).sum(), logits

        score, logits = jax.grad(total, has_aux=True)(x)
        return logits, energy.log_density(logits), _lengths(score)

    # A loop of two turns: the network stands once in the compiled program.
    logits, log_density, length = jax.lax.map(describe, jnp.stack([x, refined]))
    return {
        "log_density": log_density[0],
        "max_posterior": energy.log_posterior(logits[0]).max(axis=-1),
        "approximate_mass": -length[0],
        "max_logit": logits[0].max(axis=-1).astype(jnp.float32),
        "refine": log_density[0] - log_density[1],
        "refine_gradient": length[1] - length[0],
        "refine_distance": -_lengths(x - refined),
    }


def detection(inside: np.ndarray, outside: np.ndarray) -> Detection:
    """The separation of two sets by their scores. [N], [M] -> `Detection`.

    >>> detection(np.array([2.0, 3.0]), np.array([1.0, 2.5]))
    Detection(auroc=0.75, aupr=0.8333333333333333, fpr95=0.5, not_finite=0)
    """
    bad = int(np.isnan(inside).sum() + np.isnan(outside).sum())
    return Detection(auroc(inside, outside), aupr(inside, outside), fpr_at_tpr(inside, outside), bad)


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """P(inside > outside) + P(equal) / 2: the area under the ROC curve (Mann and Whitney 1947). NaN is lowest."""
    inside_ranks, _ = _ranks(inside, outside)
    wins = inside_ranks.sum() - len(inside) * (len(inside) + 1) / 2
    return float(wins / (len(inside) * len(outside)))


def aupr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Average precision, Σ (recall_n - recall_{n-1}) precision_n over distinct thresholds. NaN is lowest."""
    inside_ranks, outside_ranks = _ranks(inside, outside)
    thresholds = np.unique(inside_ranks)[::-1]
    caught = len(inside) - np.searchsorted(np.sort(inside_ranks), thresholds)
    wrong = len(outside) - np.searchsorted(np.sort(outside_ranks), thresholds)
    recall = np.concatenate([[0], caught / len(inside)])
    return float((np.diff(recall) * caught / (caught + wrong)).sum())


def fpr_at_tpr(inside: np.ndarray, outside: np.ndarray, tpr: float = 0.95) -> float:
    """The share of outside scores at or above the highest threshold that keeps at least `tpr` of the inside ones."""
    inside_ranks, outside_ranks = _ranks(inside, outside)
    # A product such as 0.95 · 20 may come out a little above the whole number that it is.
    accepted = max(1, int(np.ceil(tpr * len(inside) - 1e-9)))
    threshold = np.sort(inside_ranks)[len(inside) - accepted]
    return float(np.mean(outside_ranks >= threshold))


def _ranks(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks among all scores, ties at their mean; NaN below everything, minus infinity included."""
    # Only here: every command would wait a second for it.
    from scipy import stats

    scores = np.concatenate([inside, outside]).astype(np.float64)
    bad = np.isnan(scores)
    ranks = np.empty(len(scores))
    ranks[bad] = (bad.sum() + 1) / 2
    ranks[~bad] = stats.rankdata(scores[~bad]) + bad.sum()
    return ranks[: len(inside)], ranks[len(inside) :]


def _lengths(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x.reshape(len(x), -1) ** 2, axis=-1))
