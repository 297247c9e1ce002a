"""Distal adversarials: inputs far from all data of which the classifier is nevertheless sure (section 5.4, figure 6).

From noise, the gradient of log p(y | x) is followed until the classifier is confident of the class. A plain classifier
stops at something that still looks like noise; a JEM has to draw the class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jem_jax import energy

Array = jax.Array


class Distal(NamedTuple):
    """The ends of the ascents."""

    images: Array
    """[B, ...] in [-1, 1]"""
    confidence: Array
    """[B] p(y | x) of the wanted class"""
    steps: Array
    """[B] int32, until the confidence was reached; `max_steps` where it was not"""


def ascend(
    logits_fn: energy.LogitsFunction,
    x: Array,
    classes: Array,
    *,
    confidence: float = 0.9,
    max_steps: int = 400,
    step_length: float = 0.1,
) -> Distal:
    """Gradient ascent of log p(y | x), each image until it is classified as wanted. Nothing in it is random.

    >>> ends = ascend(lambda x: 10 * x, jnp.array([[0.1, -0.1], [-0.1, 0.1]]), jnp.array([0, 0]))
    >>> ends.steps.tolist(), bool((ends.confidence >= 0.9).all())
    ([1, 3], True)

    Args:
      logits_fn: x [B, ...] -> logits [B, K].
      x: [B, ...] where the ascents start, usually U(-1, 1).
      classes: [B] integers, the wanted classes.
      confidence: at which an image stops (the paper's 0.9).
      max_steps: at which it is given up.
      step_length: L2 length of a step, in [-1, 1] units, whatever the gradient's; x is clipped to [-1, 1] after it.
    """

    def log_confidence(x: Array) -> tuple[Array, Array]:
        chosen = jnp.take_along_axis(energy.log_posterior(logits_fn(x)), classes[:, None], axis=-1)[:, 0]
        return chosen.sum(), chosen

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        x, taken = carry
        gradient, reached = jax.grad(log_confidence, has_aux=True)(x)
        climbing = reached < jnp.log(confidence)
        length = jnp.sqrt(jnp.sum(gradient.reshape(len(x), -1) ** 2, axis=-1))
        scale = (step_length * climbing / jnp.maximum(length, 1e-12)).reshape(-1, *(1,) * (x.ndim - 1))
        return (jnp.clip(x + scale * gradient, -1, 1), taken + climbing), None

    (x, taken), _ = jax.lax.scan(step, (x, jnp.zeros(len(x), jnp.int32)), None, length=max_steps)
    return Distal(x, jnp.exp(log_confidence(x)[1]), taken)
