"""Out-of-distribution detection: scores of an image, and how well they tell two sets apart (section 5.3 of the paper).

A score is higher for images that look like the training data. It detects by a threshold, so everything here depends
on the order of scores alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy, prng, sgld
from jem_jax.distributed import devices

Array = jax.Array
VariablesLogits = Callable[[Any, Array], Array]

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
    """How well a score tells in-distribution from out-of-distribution images."""

    auroc: float
    """probability that an inside image scores higher than an outside one, ties counted half"""
    aupr: float
    """average precision with the inside images as the positive class; chance is their share"""
    fpr95: float
    """share of outside images let in by the threshold that lets in at least 95 % of the inside ones"""
    not_finite: int
    """scores that were NaN; they count as the lowest there is"""


def scorer(
    logits_fn: VariablesLogits,
    *,
    num_steps: int = 20,
    step_size: float = 1.0,
    noise_std: float = 0.01,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Callable[[Any, Array, np.ndarray, int], dict[str, np.ndarray]]:
    """All `SCORES` of images.

    Args:
      logits_fn: (variables, x [B, ...]) -> [B, K]; of any classifier.
      num_steps, step_size, noise_std, grad_clip, bounds: of the chain that leads from x to x′, as in `sgld.chain`
        (official defaults 20, 1, 0.01, no clipping).

    Returns:
      (variables, key, images [N, ...], batch_size) -> a score [N] float32 under each name.
    """

    def run(variables: Any, examples: tuple[Array, Array]) -> dict[str, Array]:
        chain_keys, x = examples
        density = energy.marginal(lambda x: logits_fn(variables, x))
        refined = sgld.chain(
            jax.random.wrap_key_data(chain_keys), density, x,
            num_steps=num_steps, step_size=step_size, noise_std=noise_std, grad_clip=grad_clip, bounds=bounds,
        )  # fmt: skip
        logits = logits_fn(variables, x)
        log_density, length = energy.log_density(logits), _lengths(energy.score(density, x))
        return {
            "log_density": log_density,
            "max_posterior": energy.log_posterior(logits).max(axis=-1),
            "approximate_mass": -length,
            "max_logit": logits.max(axis=-1).astype(jnp.float32),
            "refine": log_density - density(refined),
            "refine_gradient": _lengths(energy.score(density, refined)) - length,
            "refine_distance": -_lengths(x - refined),
        }

    mapped = devices.over_examples(run)

    def score(variables: Any, key: Array, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        chain_keys = np.asarray(jax.random.key_data(prng.for_examples(key, len(images))))
        return mapped(variables, (chain_keys, images), batch_size)

    return score


def detection(inside: np.ndarray, outside: np.ndarray) -> Detection:
    """How well scores tell apart. [N], [M] -> `Detection`."""
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
    kept = max(1, int(np.ceil(tpr * len(inside) - 1e-9)))
    threshold = np.sort(inside_ranks)[len(inside) - kept]
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
