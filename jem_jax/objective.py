"""JEM's training objective, from logits of data and of negatives (sections 3 and 4, algorithm 1).

    log p(x, y) = log p(x) + log p(y | x)          JEM: cross-entropy is exact, log p(x) by contrastive divergence
    log p(x, y)   directly                          the other factorisation, with class-conditional negatives

The gradient of -log p(x) is that of  mean log p~(x_q) - mean log p~(x_p)  with x_q samples of the model: the
"contrast" below. Its value is not a likelihood; only its gradient means something.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jem_jax import energy

Array = jax.Array


@dataclass(frozen=True)
class Weights:
    """Weights of the terms. The defaults are JEM's; a plain classifier is `p_x=0`."""

    p_x: float = 1.0
    p_y_given_x: float = 1.0
    p_xy: float = 0.0
    energy_l2: float = 0.0
    """weight of mean log p~(x_p)² + mean log p~(x_q)², which keeps energies near 0 (Du and Mordatch 2019)"""

    @property
    def needs_negatives(self) -> bool:
        """Whether samples of p(x) are needed."""
        return self.p_x != 0 or self.energy_l2 != 0

    @property
    def needs_conditional_negatives(self) -> bool:
        """Whether samples of p(x | y) are needed."""
        return self.p_xy != 0

    @property
    def needs_samples(self) -> bool:
        """Whether samples of either kind are needed."""
        return self.needs_negatives or self.needs_conditional_negatives


class Logits(NamedTuple):
    """Logits [B, K] of the batches that the weights call for; None where a term is off.

    Where the labelled batch is also the p(x) batch, `data` and `labelled` are the same array: one forward pass.
    """

    labelled: Array
    data: Array | None = None
    negatives: Array | None = None
    conditional_negatives: Array | None = None


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean of -log p(y | x). [B, K], [B] -> []."""
    return -jnp.mean(energy.joint_log_density(energy.log_posterior(logits), labels))


def contrast(data: Array, negatives: Array) -> Array:
    """mean log p~(negatives) - mean log p~(data), whose gradient estimates that of -log p. [B], [B'] -> []."""
    return jnp.mean(negatives) - jnp.mean(data)


def joint_loss(
    logits: Logits, labels: Array, weights: Weights, p_x_factor: float | Array = 1.0
) -> tuple[Array, dict[str, Array]]:
    """The weighted loss, and the terms it is made of.

    Args:
      logits: of the batches; the negatives must be constants (no gradient through the chain).
      labels: [B] integers, of `logits.labelled` and, class by class, of `logits.conditional_negatives`.
      weights: what each term counts.
      p_x_factor: [] factor of the weights of all terms that need negatives; it may be traced.

    Returns:
      The loss [] and a dict of scalars: `loss`, `cross_entropy`, `accuracy`; `log_px_max`, the
      largest |log p~| of any batch; `log_px_data`, `log_px_samples` (means) where there are negatives; `contrast_xy`
      for the direct factorisation.
    """
    terms = {
        "cross_entropy": cross_entropy(logits.labelled, labels),
        "accuracy": jnp.mean(jnp.argmax(logits.labelled, axis=-1) == labels),
    }
    loss = weights.p_y_given_x * terms["cross_entropy"]
    if weights.needs_negatives:
        if logits.data is None or logits.negatives is None:
            raise ValueError("these weights need logits of data and of negatives")
        data, negatives = energy.log_density(logits.data), energy.log_density(logits.negatives)
        loss += p_x_factor * weights.p_x * contrast(data, negatives)
        if weights.energy_l2:
            loss += p_x_factor * weights.energy_l2 * (jnp.mean(data**2) + jnp.mean(negatives**2))
        terms |= {"log_px_data": jnp.mean(data), "log_px_samples": jnp.mean(negatives)}
    if weights.needs_conditional_negatives:
        if logits.conditional_negatives is None:
            raise ValueError("these weights need logits of conditional negatives")
        terms["contrast_xy"] = contrast(
            energy.joint_log_density(logits.labelled, labels),
            energy.joint_log_density(logits.conditional_negatives, labels),
        )
        loss += p_x_factor * weights.p_xy * terms["contrast_xy"]
    present = [energy.log_density(values) for values in logits if values is not None]
    terms["log_px_max"] = jnp.max(jnp.stack([jnp.max(jnp.abs(values)) for values in present]))
    return loss, {"loss": loss, **terms}
