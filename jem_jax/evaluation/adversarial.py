"""Adversarial robustness: projected gradient descent, plain and through JEM's SGLD refinement (section 5.4).

ε is in [0, 1] pixels throughout, as the literature gives it; images live in [-1, 1], where it is twice as large. The
attack knows everything: weights, defence and its noise's distribution. It starts at a random point of the ball and
maximises the cross-entropy. For each image it keeps the visited point with the largest margin,
max_{y' ≠ y} f(x)[y'] - f(x)[y]; the image itself is one of these points. An attack of more steps or restarts visits the
same points and more, so that it is never weaker.

An attack takes a classifier (keys, x) -> logits, because a defence may be random. One without noise ignores its keys:
`lambda keys, x: logits_fn(x)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jem_jax import energy, prng, sgld

Array = jax.Array
Classifier = Callable[[Array, Array], Array]
"""(one key per example [B], x [B, ...]) -> logits [B, K]"""

NORMS = ("linf", "l2")
_STEP = 0.25
"""of ε, the length of an attack step; 2/255 for an ε of 8/255, as is common. It must not depend on their number."""


def refined(
    key: Array,
    logits_fn: energy.LogitsFunction,
    x: Array,
    *,
    chain_logits_fn: energy.LogitsFunction | None = None,
    num_steps: int,
    until: Array | None = None,
    step_size: float = 1.0,
    noise_std: float = 0.01,
    grad_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
    input_noise: float = 0.03,
    copies: int = 5,
    backpropagate: bool = False,
) -> Array:
    """JEM-n: the logits averaged over chains that begin at noisy copies of x, after n SGLD steps.

    >>> refined(jax.random.key(0), lambda x: x, jnp.array([[2.0, 1.0]]), num_steps=0, input_noise=0.0).tolist()
    [[2.0, 1.0]]

    Args:
      key: one PRNG key, or one per example [B].
      logits_fn: x [B, ...] -> logits [B, K].
      x: [B, ...].
      chain_logits_fn: the logits whose log p~ the chain follows, where they are others than `logits_fn`'s.
      num_steps: n; 0 leaves the input noise and the average.
      until, step_size, noise_std, grad_clip, bounds: of the chain, as in `sgld.chain`.
      input_noise: standard deviation of the copies' noise, in [-1, 1] units (official default 0.03).
      copies: of each image (official default 5).
      backpropagate: let gradients through the chain. The official attack takes them at the chain's end and passes
        them straight to the input, which is the weaker attack.

    Returns:
      Logits [B, K].
    """
    keys = jax.vmap(lambda key: jax.random.split(key, copies))(prng.of_batch(key, len(x))).reshape(-1)
    noise_keys, chain_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(noise_keys)
    start = jnp.repeat(x, copies, axis=0) + input_noise * noise
    # Stopped here rather than behind the chain, so that no gradient through it is ever prepared.
    begin = start if backpropagate else jax.lax.stop_gradient(start)
    end = sgld.chain(
        chain_keys, energy.marginal(chain_logits_fn or logits_fn), begin,
        num_steps=num_steps, until=until, step_size=step_size, noise_std=noise_std, grad_clip=grad_clip, bounds=bounds,
    )  # fmt: skip
    if not backpropagate:
        end = start + (end - begin)
    return logits_fn(end).reshape(len(x), copies, -1).mean(axis=1)


def pgd(
    key: Array,
    classifier: Classifier,
    x: Array,
    labels: Array,
    epsilon: float | Array,
    *,
    norm: str | Array,
    num_steps: int | Array,
    restarts: int = 1,
    until_all_fall: bool = False,
) -> tuple[Array, Array]:
    """Projected gradient descent from random starts (Madry et al. 2018).

    >>> plane = lambda keys, x: jnp.stack([-x.sum(axis=1), x.sum(axis=1)], axis=1)
    >>> x, labels = jnp.array([[0.3, 0.3], [0.02, 0.02]]), jnp.array([1, 1])
    >>> points, margins = pgd(jax.random.key(0), plane, x, labels, 0.05, norm="linf", num_steps=20)
    >>> (margins > 0).tolist()
    [False, True]

    Args:
      key: one PRNG key, or one per example [B].
      classifier: what is attacked. It sees other keys in every step.
      x: [B, ...] in [-1, 1].
      labels: [B] integers.
      epsilon: in [0, 1] pixels, one or one per example [B]; 0 gives x back.
      norm: "linf", the largest change of any value, or "l2", the change's length; or which of the two for each example,
        an index into `NORMS` [B].
      num_steps: at least 0; an array [] where one compiled program is to serve several.
      restarts: random starts, at least 1; the strongest point of all is returned.
      until_all_fall: end as soon as every image has a point that is a mistake. Which images fall stays the same; the
        points may be weaker than those of the whole attack.

    Returns:
      The strongest points [B, ...], within ε of x and in [-1, 1], and their margins [B]; a positive margin is a
      mistake. Where the classifier is random, judge the points with fresh keys: these were chosen for theirs.

    Raises:
      ValueError: an unknown norm.
    """
    if isinstance(norm, str):
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
        norm = jnp.full(len(x), NORMS.index(norm))
    is_l2 = _over_pixels(norm == NORMS.index("l2"), x)
    radius = _over_pixels(jnp.broadcast_to(2 * jnp.asarray(epsilon, x.dtype), len(x)), x)

    def restart(best: tuple[Array, Array], keys: Array) -> tuple[tuple[Array, Array], None]:
        return _one_start(keys, best, classifier, x, labels, radius, is_l2, num_steps, until_all_fall), None

    example_keys = prng.of_batch(key, len(x))
    # Far from the numbers that `_one_start` folds in.
    others = [jax.vmap(jax.random.fold_in, (0, None))(example_keys, 2**31 - 1 - i) for i in range(1, restarts)]
    best = x, jnp.full(len(x), -jnp.inf)
    return jax.lax.scan(restart, best, jnp.stack([example_keys, *others]))[0]


def _one_start(
    keys: Array, best: tuple[Array, Array], classifier: Classifier, x: Array, labels: Array, radius: Array,
    is_l2: Array, num_steps: int | Array, until_all_fall: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """The strongest points, and their margins, of an earlier best and a start's."""
    start_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(keys)
    start = jnp.clip(x + _random_in_ball(start_keys, x, radius, is_l2), -1, 1)

    def loss(moved: Array, index: Array) -> tuple[Array, Array]:
        logits = classifier(jax.vmap(jax.random.fold_in, (0, None))(keys, index), moved)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), margin(logits, labels)

    def goes_on(carry: tuple[Array, tuple[Array, Array], Array]) -> Array:
        index, (_, margins), _ = carry
        return (index < num_steps + 2) & ~(until_all_fall & jnp.all(margins > 0))

    def visit(carry: tuple[Array, tuple[Array, Array], Array]) -> tuple[Array, tuple[Array, Array], Array]:
        index, best, moved = carry
        gradient, margins = jax.grad(loss, has_aux=True)(moved, index)
        best = _stronger(best, moved, margins)
        ascent = jnp.where(is_l2, _unit(gradient), jnp.sign(gradient))
        ahead = x + _inside(moved + _STEP * radius * ascent - x, radius, is_l2)
        return index + 1, best, jnp.where(index == 0, start, jnp.clip(ahead, -1, 1))

    # The image itself is visited first, then the start: the network stands once in the compiled program.
    return jax.lax.while_loop(goes_on, visit, (jnp.int32(0), best, x))[1]


def _stronger(best: tuple[Array, Array], points: Array, margins: Array) -> tuple[Array, Array]:
    better = margins > best[1]
    return jnp.where(_over_pixels(better, points), points, best[0]), jnp.where(better, margins, best[1])


def margin(logits: Array, labels: Array) -> Array:
    """max_{y' ≠ y} f[y'] - f[y]: positive where the label does not win. NaN, where it cannot, counts as infinite.

    >>> margin(jnp.array([[1.0, 4.0, 2.0]]), jnp.array([1])).tolist()
    [-2.0]
    """
    own = jnp.arange(logits.shape[-1]) == labels[:, None]
    wrong = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    value = wrong - jnp.sum(jnp.where(own, logits, 0), axis=-1)
    return jnp.where(jnp.isnan(value), jnp.inf, value)


def _over_pixels(values: Any, like: Any) -> Any:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _lengths(x: Array) -> Array:
    return _over_pixels(jnp.sqrt(jnp.sum(x.reshape(len(x), -1) ** 2, axis=-1)), x)


def _unit(x: Array) -> Array:
    return x / jnp.maximum(_lengths(x), 1e-12)


def _inside(change: Array, radius: Array, is_l2: Array) -> Array:
    """The nearest change within the ball."""
    shrunk = change * jnp.minimum(1, radius / jnp.maximum(_lengths(change), 1e-12))
    return jnp.where(is_l2, shrunk, jnp.clip(change, -radius, radius))


def _random_in_ball(example_keys: Array, x: Array, radius: Array, is_l2: Array) -> Array:
    shape = x.shape[1:]
    cube = jax.vmap(lambda key: jax.random.uniform(key, shape, x.dtype, -1, 1))(example_keys)
    direction = _unit(jax.vmap(lambda key: jax.random.normal(key, shape, x.dtype))(example_keys))
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (), x.dtype))(example_keys)
    sphere = direction * _over_pixels(draw ** (1 / np.prod(shape)), x)
    return jnp.where(is_l2, sphere, cube) * radius
