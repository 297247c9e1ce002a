"""The energy-based model inside a classifier (Grathwohl et al. 2020, section 3).

A classifier's logits f(x)[y] define, up to one normaliser shared by all x and y,

    log p~(x, y) = f(x)[y]
    log p~(x)    = logsumexp_y f(x)[y] = -E(x)
    log p(y | x) = f(x)[y] - log p~(x)       the ordinary softmax: the normaliser cancels

The first group of functions starts from logits [..., K]. The second turns a logits function x [B, ...] -> [B, K] into
a log density x [B, ...] -> [B], which is what `jem_jax.sgld` samples from.

Everything is computed in at least float32, whatever precision the logits come in.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
LogitsFunction = Callable[[Array], Array]
LogDensity = Callable[[Array], Array]


def _at_least_float32(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def log_density(logits: Array) -> Array:
    """log p~(x) = logsumexp_y f(x)[y] (equation 5), stable for logits of any size.

    Args:
      logits: [..., K].

    Returns:
      [...] unnormalised log densities.
    """
    return jax.nn.logsumexp(_at_least_float32(logits), axis=-1)


def energy(logits: Array) -> Array:
    """E(x) = -log p~(x) (equation 7). [..., K] -> [...]."""
    return -log_density(logits)


def joint_log_density(logits: Array, labels: Array) -> Array:
    """log p~(x, y) = f(x)[y] (equation 4).

    Args:
      logits: [..., K].
      labels: [...] integers in [0, K). An index outside gives NaN, never another class.

    Returns:
      [...] unnormalised log densities.
    """
    chex.assert_shape(labels, logits.shape[:-1])
    # A negative index would count from the end.
    inside = jnp.where(labels < 0, logits.shape[-1], labels.astype(jnp.int32))
    chosen = jnp.take_along_axis(_at_least_float32(logits), inside[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    return chosen.squeeze(-1)


def log_posterior(logits: Array) -> Array:
    """log p(y | x) for every class: log_softmax of the logits. [..., K] -> [..., K]."""
    return jax.nn.log_softmax(_at_least_float32(logits), axis=-1)


def marginal(logits_fn: LogitsFunction) -> LogDensity:
    """The log density x [B, ...] -> log p~(x) [B] of a logits function."""
    return lambda x: log_density(logits_fn(x))


def conditional(logits_fn: LogitsFunction, labels: Array) -> LogDensity:
    """The log density `x [B, ...] -> f(x)[y] [B]` with one fixed label for each example.

    Its gradient is that of log p(x | y): the normaliser of the class does not depend on x.

    Args:
      logits_fn: x [B, ...] -> [B, K].
      labels: [B] integers in [0, K).
    """
    return lambda x: joint_log_density(logits_fn(x), labels)


def score(log_density: LogDensity, x: Array) -> Array:
    """∇_x log p(x), for each example of a batch.

    Where examples influence each other's density, as by batch statistics, it is the gradient of the sum over them; the
    released JEM++ and SADA-JEM follow that.

    Args:
      log_density: x [B, ...] -> [B].
      x: [B, ...] floating point.

    Returns:
      The gradient, of x's shape and dtype.

    Raises:
      AssertionError: `log_density` does not return one value per example.
    """

    def total(x: Array) -> Array:
        values = log_density(x)
        chex.assert_shape(values, (x.shape[0],))
        return values.sum()

    return jax.grad(total)(x)
