"""One training iteration as one compiled program (paper, algorithm 1): batches, chains, loss, update, write-back.

The step runs on every device over its own part of the batch and of the replay buffer. Nothing goes to the host, and
devices meet once, in the mean of gradients, batch statistics and metrics; with sharpness-aware minimisation twice. An
iteration that is not finite, or whose log densities run away, is undone by the step itself: parameters, optimiser and
buffer stay what they were.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jem_jax import objective, replay_buffer, sam
from jem_jax.augment import augment, to_float
from jem_jax.distributed import devices
from jem_jax.training import divergence, negatives
from jem_jax.training.negatives import own_keys
from jem_jax.training.network import Variables
from jem_jax.training.state import Keys, StepSpec, StreamedBatch, TrainingData, TrainState, window_with

Array = jax.Array

Step = Callable[[TrainState, Array | None, TrainingData], tuple[TrainState, Array | None]]
"""An iteration: (state, buffer, data) -> (state, buffer), the buffer as `devices.shard_buffer` makes it; it is None
where no negatives are needed"""


def per_device(spec: StepSpec, streamed: bool = False) -> Step:
    """The step mapped over devices; the buffer [devices, S, *flat] is donated.

    Args:
      spec: constants of the compiled program.
      streamed: the step is given `StreamedBatch`es rather than `ResidentData`.
    """
    axes: Any = (0, 0, 0, 0, None)
    data_axes = StreamedBatch(*axes) if streamed else None
    return devices.per_device(
        functools.partial(train_step, spec), in_axes=(None, 0, data_axes), out_axes=(None, 0), donate_argnums=(1,)
    )


def train_step(
    spec: StepSpec, state: TrainState, rows: Array | None, data: TrainingData
) -> tuple[TrainState, Array | None]:
    """Algorithm 1 on one device. Returns the state after the iteration, and the buffer with the chains' ends."""
    keys = Keys(*jax.random.split(jax.random.fold_in(state.key, state.step), len(Keys._fields)))
    buffer = None if rows is None else rows.reshape(len(rows), -1, *devices.flat(spec.image_shape))
    mask_key = jax.random.fold_in(keys.dropout, devices.index())

    raw, y = _batch(spec, data, state.step, labelled=True)
    x_labelled = _augmented(spec, keys.augment_labelled, raw, labelled=True)
    marginal = negatives.marginal(spec, state, buffer, data, keys, mask_key)
    conditional = negatives.conditional(spec, state, buffer, data, keys, mask_key, y)
    batches = {"labelled": x_labelled}
    if marginal is not None:
        batches["negatives"] = marginal.x
    if conditional is not None:
        batches["conditional_negatives"] = conditional.x
    # Images of the data come last: the last pass makes nine tenths of the running statistics of batch norm.
    if marginal is not None and not spec.share_batch:
        batches["data"] = _augmented(spec, keys.augment, _batch(spec, data, state.step, labelled=False)[0], False)
    else:
        batches["labelled"] = batches.pop("labelled")

    gradient = jax.grad(functools.partial(_loss, spec, state, batches, y, mask_key), has_aux=True)
    gradients, (metrics, model_state) = gradient(state.params)
    if spec.program.sam:
        # All devices must climb to the same point, which takes an all-reduce of its own. The second pass's batch
        # statistics are dropped, as released.
        gradients = gradient(sam.ascend(state.params, devices.mean(gradients), *spec.sam))[0]
    health = _health(spec, batches, (gradients, model_state, metrics), metrics.pop("log_px_max"))
    gradients, model_state, metrics, health = devices.mean((gradients, model_state, metrics, health))
    state, undo = _updated(spec, state, gradients, model_state, metrics, health)
    for chains in (marginal, conditional):
        if chains is not None:
            assert buffer is not None
            ends = chains.x.reshape(len(chains.x), *buffer.shape[2:])
            buffer = replay_buffer.write(buffer, chains.slots, ends, labels=chains.labels, discard=undo)
    return state, None if rows is None or buffer is None else buffer.reshape(rows.shape)


def _batch(spec: StepSpec, data: TrainingData, step: Array, labelled: bool) -> tuple[Array, Array]:
    """This device's images [b, H, W, C] uint8 and labels [b] of an iteration, of one of the two streams."""
    if isinstance(data, StreamedBatch):
        return (data.labelled_images, data.labelled_labels) if labelled else (data.images, data.labels)
    order = data.labelled_order if labelled else data.order
    local = spec.local_batch(labelled)
    batch_size = local * devices.count()
    start = step % (order.shape[0] // batch_size) * batch_size + devices.index() * local
    rows = jax.lax.dynamic_slice(order, (start,), (local,))
    return data.images[rows].reshape(local, *spec.image_shape), data.labels[rows]


def _augmented(spec: StepSpec, key: Array, images: Array, labelled: bool) -> Array:
    """uint8 images as floats in [-1, 1], augmented; plain ones of p(x) get the input noise alone."""
    settings, plain = spec.data, not (labelled or spec.data.augment_p_x)

    def augment_image(key: Array, image: Array) -> Array:
        return augment(
            key,
            image,
            pad=0 if plain else settings.pad,
            pad_mode=settings.pad_mode,
            flip=settings.flip and not plain,
            noise_std=settings.input_noise,
        )

    return jax.vmap(augment_image)(own_keys(spec, key, labelled), to_float(images))


def _loss(
    spec: StepSpec, state: TrainState, batches: dict[str, Array], y: Array, mask_key: Array, params: Any
) -> tuple[Array, tuple[dict[str, Array], Variables]]:
    """The joint loss at some parameters, its metrics, and the collections that the passes updated."""
    variables = {**state.variables, "params": params}
    passes = spec.network.frozen_logits if spec.program.frozen else spec.network.train_logits
    logits, model_state = passes(variables, list(batches.values()), mask_key)
    named = dict(zip(batches, logits, strict=True))
    named.setdefault("data", named["labelled"])
    factor = spec.p_x_factor(state.step)
    value, metrics = objective.joint_loss(objective.Logits(**named), y, spec.terms, p_x_factor=factor)
    return value, (metrics, model_state)


def _health(spec: StepSpec, batches: dict[str, Array], values: Any, log_px_max: Array) -> divergence.Health:
    """This device's signs of divergence in an iteration."""
    samples = [batches[name] for name in ("negatives", "conditional_negatives") if name in batches]
    moments = divergence.moments(batches.get("data", batches["labelled"]), samples)
    return divergence.health(values, log_px_max, spec.max_log_density, moments)


def _updated(
    spec: StepSpec, state: TrainState, gradients: Any, model_state: Variables, metrics: dict[str, Array],
    health: divergence.Health,
) -> tuple[TrainState, Array]:  # fmt: skip
    """The state after the iteration, and whether the iteration was undone.

    Where it was, parameters, statistics and the optimiser's state are the old ones; the count of iterations moves on.
    """
    updates, opt_state = spec.optimizer.update(gradients, state.opt_state, state.params)
    # Either rule multiplies by the learning rate last, so that a factor of the update is one of the rate.
    updates = jax.tree.map(lambda update: update * state.learning_rate_factor, updates)
    params = optax.apply_updates(state.params, updates)
    not_finite, runaway = health.not_finite > 0, health.runaway > 0
    undo = not_finite | runaway
    metrics = metrics | divergence.measures(health.moments)
    if spec.clips:
        metrics["gradient_norm"] = optax.global_norm(gradients)
    watch = divergence.watched(state.watch, state.step, not_finite, runaway, metrics, spec.limits)
    ema = optax.incremental_update(params, state.ema, 1 - spec.ema_decay) if spec.ema_decay else None
    old = (state.params, state.model_state, state.opt_state, state.ema)
    new = (params, model_state, opt_state, ema)
    params, model_state, opt_state, ema = jax.tree.map(
        lambda old, new: jnp.where(undo, old, new).astype(old.dtype), old, new
    )
    window = window_with(state.window, state.step, metrics, spec.log_every)
    return state._replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema, watch=watch,
        window=window,
    ), undo  # fmt: skip
