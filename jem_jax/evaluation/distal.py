"""Distal adversarials: inputs far from all data of which the classifier is nevertheless sure (section 5.4, figure 6).

From noise, the gradient of log p(y | x) is followed until the classifier is confident of the class. A plain classifier
stops at something that still looks like noise; a JEM has to draw the class.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy, prng, replay_buffer
from jem_jax.distributed import devices

Array = jax.Array
VariablesLogits = Callable[[Any, Array], Array]


class Distal(NamedTuple):
    """Where the ascents ended."""

    images: np.ndarray
    """[N, ...] in [-1, 1]"""
    confidence: np.ndarray
    """[N] p(y | x) of the class that was climbed towards"""
    steps: np.ndarray
    """[N] int32, until the confidence was reached; all of them where it was not"""


def ascender(
    logits_fn: VariablesLogits, *, confidence: float = 0.9, max_steps: int = 400, step_length: float = 0.1
) -> Callable[[Any, Array, np.ndarray, tuple[int, ...], int], Distal]:
    """Gradient ascent of log p(y | x) from U(-1, 1), each image until it is classified as wanted.

    Args:
      logits_fn: (variables, x) -> logits.
      confidence: at which an image stops (the paper's 0.9).
      max_steps: at which it is given up.
      step_length: L2 length of a step, in [-1, 1] units, whatever the gradient's; x is clipped to [-1, 1] after it.

    Returns:
      (variables, key, classes [N], image_shape, batch_size) -> `Distal`.
    """

    def run(variables: Any, examples: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        start, classes = examples

        def log_confidence(x: Array) -> tuple[Array, Array]:
            chosen = jnp.take_along_axis(energy.log_posterior(logits_fn(variables, x)), classes[:, None], axis=-1)[:, 0]
            return chosen.sum(), chosen

        def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            x, taken = carry
            gradient, reached = jax.grad(log_confidence, has_aux=True)(x)
            climbing = reached < jnp.log(confidence)
            length = jnp.sqrt(jnp.sum(gradient.reshape(len(x), -1) ** 2, axis=-1))
            scale = (step_length * climbing / jnp.maximum(length, 1e-12)).reshape(-1, *(1,) * (x.ndim - 1))
            return (jnp.clip(x + scale * gradient, -1, 1), taken + climbing), None

        (x, taken), _ = jax.lax.scan(step, (start, jnp.zeros(len(start), jnp.int32)), None, length=max_steps)
        return x, jnp.exp(log_confidence(x)[1]), taken

    mapped = devices.over_examples(run)

    def ascend(
        variables: Any, key: Array, classes: np.ndarray, image_shape: tuple[int, ...], batch_size: int
    ) -> Distal:
        start = replay_buffer.uniform(prng.for_examples(key, len(classes)), len(classes), image_shape)
        return Distal(*mapped(variables, (np.asarray(start), classes), batch_size))

    return ascend
