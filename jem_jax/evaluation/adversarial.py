"""Adversarial robustness: projected gradient descent, plain and through JEM's SGLD refinement (section 5.4).

ε is in [0, 1] pixels throughout, as the literature gives it; images live in [-1, 1], where it is twice as large. The
attack knows everything: weights, defence and its noise's distribution. It maximises the cross-entropy, starts at a
random point of the ball, and of all the points that it visits keeps for each image the one with the largest margin
max_{y' ≠ y} f(x)[y'] - f(x)[y], the image itself among them. An attack of more steps or restarts visits the same
points and more, so that it is never weaker.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jem_jax import energy, prng, sgld
from jem_jax.distributed import devices

Array = jax.Array
VariablesLogits = Callable[[Any, Array], Array]
Defence = Callable[[Any, Array, Array], Array]
"""(variables, one key per example [B], x [B, ...]) -> logits [B, K]"""

NORMS = ("linf", "l2")
_STEP = 0.25
"""of ε, the length of an attack step; 2/255 for an ε of 8/255, as is common. It must not depend on their number."""


class Attacked(NamedTuple):
    """What an attack found."""

    images: np.ndarray
    """[N, ...] the strongest points, within ε of the images and in [-1, 1]"""
    right: np.ndarray
    """[N] bool: still classified as the label, under fresh noise where the defence has any"""


Attacker = Callable[[Any, Array, np.ndarray, np.ndarray, float, int], Attacked]
"""(variables, key, images [N, ...] in [-1, 1], labels [N], epsilon, batch_size) -> `Attacked`"""


def undefended(logits_fn: VariablesLogits) -> Defence:
    """The classifier as it is."""
    return lambda variables, _, x: logits_fn(variables, x)


def refined(
    logits_fn: VariablesLogits,
    *,
    num_steps: int,
    step_size: float = 1.0,
    noise_std: float = 0.01,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
    input_noise: float = 0.03,
    chains: int = 5,
    backpropagate: bool = False,
) -> Defence:
    """JEM-n: the logits averaged over chains that begin at noisy copies of x, after n SGLD steps.

    Args:
      logits_fn: (variables, x) -> logits.
      num_steps: n; 0 leaves the input noise and the average.
      step_size, noise_std, grad_clip, bounds: of the chain, as in `sgld.chain`.
      input_noise: standard deviation of the copies' noise, in [-1, 1] units (official default 0.03).
      chains: copies of each image (official default 5).
      backpropagate: let gradients through the chain. The official attack takes them at the chain's end and passes
        them straight to the input, which is the weaker attack.
    """

    def defended(variables: Any, example_keys: Array, x: Array) -> Array:
        both = jax.vmap(lambda key: jax.random.split(key, chains))(example_keys).reshape(-1)
        noise_keys, chain_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(both)
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(noise_keys)
        start = jnp.repeat(x, chains, axis=0) + input_noise * noise
        density = energy.marginal(lambda x: logits_fn(variables, x))
        end = sgld.chain(
            chain_keys, density, start,
            num_steps=num_steps, step_size=step_size, noise_std=noise_std, grad_clip=grad_clip, bounds=bounds,
        )  # fmt: skip
        if not backpropagate:
            end = start + jax.lax.stop_gradient(end - start)
        return logits_fn(variables, end).reshape(len(x), chains, -1).mean(axis=1)

    return defended


def pgd(
    defence: Defence,
    variables: Any,
    example_keys: Array,
    x: Array,
    labels: Array,
    epsilon: float | Array,
    *,
    norm: str,
    num_steps: int,
) -> tuple[Array, Array]:
    """One run of the attack from a random start (Madry et al. 2018), as a pure function.

    Args:
      defence: what is attacked.
      example_keys: one PRNG key per example [B].
      x: [B, ...] in [-1, 1].
      labels: [B] integers.
      epsilon: in [0, 1] pixels; 0 gives x back.
      norm: "linf", the largest change of any value, or "l2", the change's length.
      num_steps: at least 0.

    Returns:
      The strongest points [B, ...] and their margins [B]; a positive margin is a mistake.

    Raises:
      ValueError: an unknown norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    radius = 2 * jnp.asarray(epsilon, x.dtype)
    inside = _linf_ball if norm == "linf" else _l2_ball
    ascent = jnp.sign if norm == "linf" else _unit

    def loss(moved: Array, index: Array) -> tuple[Array, Array]:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(example_keys, index)
        logits = defence(variables, step_keys, moved)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), margin(logits, labels)

    def visit(best: tuple[Array, Array], moved: Array, index: Array) -> tuple[tuple[Array, Array], Array]:
        gradient, margins = jax.grad(loss, has_aux=True)(moved, index)
        stronger = margins > best[1]
        points = jnp.where(_over_pixels(stronger, moved), moved, best[0])
        return (points, jnp.where(stronger, margins, best[1])), gradient

    def step(carry: tuple[tuple[Array, Array], Array], index: Array) -> tuple[tuple[tuple[Array, Array], Array], None]:
        best, moved = carry
        best, gradient = visit(best, moved, index)
        moved = x + inside(moved + _STEP * radius * ascent(gradient) - x, radius)
        return (best, jnp.clip(moved, -1, 1)), None

    start_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(example_keys)
    moved = jnp.clip(x + _random_in_ball(start_keys, x, radius, norm), -1, 1)
    clean = margin(defence(variables, example_keys, x), labels)
    (best, moved), _ = jax.lax.scan(step, ((x, clean), moved), jnp.arange(num_steps))
    return visit(best, moved, jnp.asarray(num_steps))[0]


def margin(logits: Array, labels: Array) -> Array:
    """max_{y' ≠ y} f[y'] - f[y]: positive where the label does not win. NaN, where it cannot, counts as infinite."""
    own = jnp.arange(logits.shape[-1]) == labels[:, None]
    wrong = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    value = wrong - jnp.sum(jnp.where(own, logits, 0), axis=-1)
    return jnp.where(jnp.isnan(value), jnp.inf, value)


def attacker(defence: Defence, *, norm: str, num_steps: int, restarts: int = 1) -> Attacker:
    """The attack over many images, on all devices, the best of its restarts for each image."""

    def attack(shared: tuple[Any, Array], examples: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        variables, epsilon = shared
        key_data, x, labels = examples
        example_keys = jax.random.wrap_key_data(key_data)
        return pgd(defence, variables, example_keys, x, labels, epsilon, norm=norm, num_steps=num_steps)

    def classify(variables: Any, examples: tuple[Array, Array, Array]) -> Array:
        key_data, x, labels = examples
        return margin(defence(variables, jax.random.wrap_key_data(key_data), x), labels) < 0

    attack_all, classify_all = devices.over_examples(attack), devices.over_examples(classify)

    def run(
        variables: Any, key: Array, images: np.ndarray, labels: np.ndarray, epsilon: float, batch_size: int
    ) -> Attacked:
        attack_key, final_key = jax.random.split(key)
        strongest: np.ndarray = images
        margins = np.full(len(images), -np.inf, np.float32)
        # At ε 0 there is nowhere to go.
        for restart in range(restarts if epsilon else 0):
            data = _key_data(jax.random.fold_in(attack_key, restart), len(images))
            found, new = attack_all((variables, np.float32(epsilon)), (data, images, labels), batch_size)
            better = new > margins
            strongest = np.where(_over_pixels(better, images), found, strongest)
            margins = np.where(better, new, margins)
        data = _key_data(final_key, len(images))
        return Attacked(strongest, classify_all(variables, (data, strongest, labels), batch_size))

    return run


def _key_data(key: Array, count: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(prng.for_examples(key, count)))


def _over_pixels(values: Any, like: Any) -> Any:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _lengths(x: Array) -> Array:
    return _over_pixels(jnp.sqrt(jnp.sum(x.reshape(len(x), -1) ** 2, axis=-1)), x)


def _unit(x: Array) -> Array:
    return x / jnp.maximum(_lengths(x), 1e-12)


def _linf_ball(change: Array, radius: Array) -> Array:
    return jnp.clip(change, -radius, radius)


def _l2_ball(change: Array, radius: Array) -> Array:
    return change * jnp.minimum(1, radius / jnp.maximum(_lengths(change), 1e-12))


def _random_in_ball(example_keys: Array, x: Array, radius: Array, norm: str) -> Array:
    shape = x.shape[1:]
    if norm == "linf":
        return jax.vmap(lambda key: jax.random.uniform(key, shape, x.dtype, -1, 1))(example_keys) * radius
    direction = _unit(jax.vmap(lambda key: jax.random.normal(key, shape, x.dtype))(example_keys))
    place = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (), x.dtype))(example_keys)
    return direction * radius * _over_pixels(place ** (1 / np.prod(shape)), x)
