"""The negatives of an iteration: chains from the replay buffer (paper, equation 2 and algorithm 1).

The sampler itself is `jem_jax.sgld`. Another one goes beside that file and is called in `_chains`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jem_jax import energy, prng, replay_buffer, sgld
from jem_jax.distributed import devices
from jem_jax.training import quantities
from jem_jax.training.network import in_parts
from jem_jax.training.state import Keys, StepSpec, TrainingData, TrainState

Array = jax.Array


class Negatives(NamedTuple):
    """Ends of chains, and where they are to be written."""

    x: Array
    """[b, H, W, C]"""
    slots: Array
    """int32 [b]"""
    labels: Array | None
    """int32 [b]: the classes whose slots those are; None where the buffer has one class"""


def marginal(
    spec: StepSpec, state: TrainState, buffer: Array | None, data: TrainingData, keys: Keys, mask_key: Array
) -> Negatives | None:
    """x_q of p(x); of p(x | y) with classes drawn at random where sampling is class-conditional."""
    if not spec.terms.needs_negatives:
        return None
    assert buffer is not None
    classes = None
    if buffer.shape[1] > 1:
        own = own_keys(spec, keys.classes, labelled=False)
        classes = jax.vmap(lambda key: prng.integers(key, (), spec.num_classes))(own)
    follows_class = spec.sampler.class_conditional and classes is not None
    return _chains(spec, state, buffer, data, keys.marginal, mask_key, classes, follows_class, labelled=False)


def conditional(
    spec: StepSpec, state: TrainState, buffer: Array | None, data: TrainingData, keys: Keys, mask_key: Array, y: Array
) -> Negatives | None:
    """x_q of p(x | y) for the labels of the batch."""
    if not spec.terms.needs_conditional_negatives:
        return None
    assert buffer is not None
    return _chains(spec, state, buffer, data, keys.conditional, mask_key, y, follows_class=True, labelled=True)


def own_keys(spec: StepSpec, key: Array, labelled: bool) -> Array:
    """Keys of this device's examples in the batch of a stream."""
    size = spec.local_batch(labelled)
    return prng.for_examples(key, size, devices.index() * size)


def _chains(
    spec: StepSpec, state: TrainState, buffer: Array, data: TrainingData, key: Array, mask_key: Array,
    classes: Array | None, follows_class: bool, labelled: bool,
) -> Negatives:  # fmt: skip
    """K SGLD steps from slots of the buffer or from fresh chains; no gradient passes through them."""
    split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)
    draw_keys, fresh_keys, chain_keys = split(own_keys(spec, key, labelled))
    fresh = _fresh_starts(fresh_keys, buffer.shape[2:], data.starts, classes)
    start = replay_buffer.draw(draw_keys, buffer, fresh, reinit_prob=spec.sampler.reinit_prob, labels=classes)
    own_statistics = spec.sampler.batch_statistics and not spec.program.frozen
    # Dropout, where there is any, goes with the batch's statistics: one mask for the whole chain.
    network, variables = spec.network, spec.network.cast(state.variables)
    logits_fn: Callable[[Array], Array] = functools.partial(network.logits, variables)
    if own_statistics:
        logits_fn = functools.partial(network.batch_logits, variables, key=mask_key)

    def ends(part: tuple[Array, Array, Array | None]) -> Array:
        part_keys, x, part_classes = part
        density = energy.marginal(logits_fn)
        if follows_class:
            assert part_classes is not None
            density = energy.conditional(logits_fn, part_classes)
        settings = quantities.sgld_settings(spec.sampler) | {"unroll": spec.sampler.unroll}
        return sgld.chain(part_keys, density, x, num_steps=spec.program.num_steps, **settings)

    x = start.x.reshape(-1, *spec.image_shape)
    batch = (chain_keys, x, classes)
    x = ends(batch) if own_statistics else in_parts(ends, batch, x.shape)
    return Negatives(jax.lax.stop_gradient(x), start.slots, classes)


def _fresh_starts(example_keys: Array, shape: tuple[int, ...], starts: Array | None, classes: Array | None) -> Array:
    """Starts of fresh chains [b, *shape]: U(-1, 1), or one of the epoch's starts, of the chain's class if any."""
    if starts is None:
        return replay_buffer.uniform(example_keys, example_keys.shape[0], shape)

    def pick_start(key: Array, label: Array | int) -> Array:
        row, column = prng.integers(key, (2,), np.array(starts.shape[:2]))
        return starts[row, column if classes is None else label]

    return jax.vmap(pick_start, (0, None if classes is None else 0))(example_keys, 0 if classes is None else classes)
