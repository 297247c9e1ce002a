"""Stochastic gradient Langevin dynamics, with JEM's step size and noise decoupled (equation 2 and appendix H.3).

One step moves

    x <- x + step_size · ∇_x log p~(x) + noise_std · ε,     ε ~ N(0, I)

Langevin dynamics proper ties noise_std to √(2·step_size); JEM samples a colder, tempered density with
step size 1 and noise 0.01. The textbook chain is `noise_std=math.sqrt(2 * step_size)`.

Nothing here is jitted: the caller's step is. For direct use, `make_sampler` gives a jitted function.
Gradients are taken with respect to x only, and none is stopped: a training step that must not differentiate
through the chain says `jax.lax.stop_gradient` itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jem_jax import energy, prng

Array = jax.Array
Schedule = Callable[[Array], Array]


def step(
    key: Array,
    log_density: energy.LogDensity,
    x: Array,
    *,
    step_size: float | Array,
    noise_std: float | Array,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Array:
    """One SGLD step.

    Args:
      key: one PRNG key, or one per example [B].
      log_density: x [B, ...] -> [B].
      x: [B, ...] floating point, any shape.
      step_size: factor of the gradient (official default 1.0).
      noise_std: standard deviation of the noise, in units of x (official default 0.01).
      grad_clip: the gradient is clipped to ±grad_clip element by element (JEM++ and SADA-JEM: 1).
      bounds: x is clipped to (low, high) after the step (JEM++ and SADA-JEM: -1, 1).

    Returns:
      x after the step, of the same shape and dtype.
    """
    gradient = energy.score(log_density, x)
    if grad_clip is not None:
        gradient = jnp.clip(gradient, -grad_clip, grad_clip)
    moved = x + step_size * gradient
    if not (isinstance(noise_std, int | float) and noise_std == 0):
        moved = moved + noise_std * _noise(key, x)
    if bounds is not None:
        moved = jnp.clip(moved, *bounds)
    return moved.astype(x.dtype)


def chain(
    key: Array,
    log_density: energy.LogDensity,
    x: Array,
    *,
    num_steps: int,
    step_size: float | Array | Schedule,
    noise_std: float | Array,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
    until: Array | None = None,
    unroll: int = 1,
) -> Array:
    """`num_steps` SGLD steps in one `lax.scan`, in memory that does not grow with their number.

    Args:
      key: one PRNG key, or one per example [B]; an example's noise depends on its own key alone.
      log_density: x [B, ...] -> [B].
      x: [B, ...] starting points.
      num_steps: K, at least 0 (official default 20).
      step_size: a number, or a schedule: step index (int32, from 0) -> number.
      noise_std, grad_clip, bounds: as in `step`.
      until: [] integer, at which the chain stands still: one compiled program then serves every K up to `num_steps`.
      unroll: steps in one turn of the compiled loop; another value changes speed, memory and compile time alone.

    Returns:
      The chains' ends, of x's shape and dtype.

    Raises:
      ValueError: negative `num_steps`, or keys of another batch size.
    """
    body = _chain_body(key, log_density, x, step_size, noise_std, grad_clip, bounds)
    if until is not None:
        moves, body = body, lambda x, index: jax.lax.cond(index < until, moves, lambda x, _: (x, None), x, index)
    return jax.lax.scan(body, x, jnp.arange(_checked(num_steps)), unroll=unroll)[0]


def trajectory(
    key: Array,
    log_density: energy.LogDensity,
    x: Array,
    *,
    num_steps: int,
    every: int,
    step_size: float | Array | Schedule,
    noise_std: float | Array,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Array:
    """The same chain, with its state kept at the start and after every `every` steps.

    Args and errors are those of `chain`; its end is `trajectory(...)[-1]`.

    Returns:
      [num_steps // every + 1, B, ...].

    Raises:
      ValueError: `every` is not positive or does not divide `num_steps`.
    """
    if every < 1 or _checked(num_steps) % every:
        raise ValueError(f"every must be positive and divide num_steps; got every={every}, num_steps={num_steps}")
    body = _chain_body(key, log_density, x, step_size, noise_std, grad_clip, bounds)

    def segment(x: Array, steps: Array) -> tuple[Array, Array]:
        x, _ = jax.lax.scan(body, x, steps)
        return x, x

    _, states = jax.lax.scan(segment, x, jnp.arange(num_steps).reshape(-1, every))
    return jnp.concatenate([x[None], states])


def make_sampler(log_density: Callable[[Any, Array], Array], **settings: Any) -> Callable[[Any, Array, Array], Array]:
    """A jitted sampler of a parametric log density, compiled once for all parameter values.

    Args:
      log_density: (params, x [B, ...]) -> [B].
      **settings: the keyword arguments of `chain`.

    Returns:
      (params, key, x) -> x after the chain.
    """

    @jax.jit
    def sample(params: Any, key: Array, x: Array) -> Array:
        return chain(key, lambda x: log_density(params, x), x, **settings)

    return sample


def _chain_body(
    key: Array,
    log_density: energy.LogDensity,
    x: Array,
    step_size: float | Array | Schedule,
    noise_std: float | Array,
    grad_clip: float | None,
    bounds: tuple[float, float] | None,
) -> Callable[[Array, Array], tuple[Array, None]]:
    example_keys = prng.of_batch(key, x.shape[0])

    def body(x: Array, index: Array) -> tuple[Array, None]:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(example_keys, index)
        size = step_size(index) if callable(step_size) else step_size
        return step(
            step_keys, log_density, x, step_size=size, noise_std=noise_std, grad_clip=grad_clip, bounds=bounds
        ), None

    return body


def _noise(key: Array, x: Array) -> Array:
    example_keys = prng.of_batch(key, x.shape[0])
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(example_keys)


def _checked(num_steps: int) -> int:
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, not {num_steps}")
    return num_steps
