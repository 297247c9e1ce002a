"""One training iteration as one compiled program: batches, chains, loss, update and write-back (paper, algorithm 1).

The step runs on every device over its own part of the batch and of the replay buffer. Nothing goes to the host, and
devices meet once, in the mean of gradients, batch statistics and metrics; with sharpness-aware minimisation twice. An
iteration that is not finite, or whose log densities run away, is undone by the step itself: parameters, optimiser and
buffer stay what they were. That, and slower ways to diverge, are recorded in the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jem_jax import energy, objective, prng, replay_buffer, sam, sgld
from jem_jax.augment import augment, to_float
from jem_jax.config import Config
from jem_jax.distributed import devices
from jem_jax.training import divergence
from jem_jax.training.network import Network, Variables, in_parts

Array = jax.Array


class Window(NamedTuple):
    """Metrics summed on the device since the last line of the log, so that logging alone reads them."""

    sums: dict[str, Array]
    """of float32 [] each"""
    steps: Array
    """int32 []: iterations in the sums"""


class TrainState(NamedTuple):
    """All that an iteration starts from, but for the replay buffer."""

    step: Array
    """int32 []: iterations done"""
    params: Any
    model_state: Variables
    """the network's other collections: batch statistics"""
    opt_state: Any
    ema: Any
    """averaged parameters, or None"""
    key: Array
    """the run's PRNG key, another after each recovery; an iteration folds its number in"""
    learning_rate_factor: Array
    """float32 []: 1 but for a while after a recovery"""
    watch: divergence.Watch
    window: Window

    @property
    def evaluation_variables(self) -> Variables:
        """What the network is evaluated with: the averaged parameters where there are any."""
        return {**self.model_state, "params": self.params if self.ema is None else self.ema}


class ResidentData(NamedTuple):
    """What batches are gathered from, whole on every device."""

    images: Array
    """uint8 [N, H, W, C]"""
    labels: Array
    """int32 [N]"""
    order: Array
    """int32 [steps · batch]: this epoch's order of the p(x) stream"""
    labelled_order: Array
    """int32 [steps · labelled batch]: that of the labelled stream"""
    starts: Array | None = None
    """float32 [P, K, H, W, C]: where chains that start afresh in this epoch may do so; None: U(-1, 1)"""


class StreamedBatch(NamedTuple):
    """An iteration's batches, cut by device: [devices, b, ...] outside the step, [b, ...] in it."""

    images: Array
    """uint8 [b, H, W, C] of the p(x) stream"""
    labels: Array
    """int32 [b]"""
    labelled_images: Array
    """uint8 [b', H, W, C] of the labelled stream"""
    labelled_labels: Array
    """int32 [b']"""
    starts: Array | None = None
    """float32 [P, K, H, W, C] as of `ResidentData`: whole on every device"""


TrainingData = ResidentData | StreamedBatch


Step = Callable[[TrainState, Array | None, TrainingData], tuple[TrainState, Array | None]]
"""An iteration: (state, buffer, data) -> (state, buffer), the buffer as `devices.shard_buffer` makes it; it is None
where no negatives are needed"""


class _Keys(NamedTuple):
    """One key for each use in an iteration, the same on all devices."""

    augment: Array
    augment_labelled: Array
    classes: Array
    marginal: Array
    conditional: Array
    dropout: Array


class _Negatives(NamedTuple):
    """Ends of chains, and where they are to be written."""

    x: Array
    slots: Array
    labels: Array | None


def weights(config: Config) -> objective.Weights:
    """The objective's weights from the settings."""
    settings = config.objective
    return objective.Weights(settings.p_x, settings.p_y_given_x, settings.p_xy, settings.energy_l2)


def chains(config: Config) -> int:
    """How many chains an iteration runs, all devices together."""
    terms = weights(config)
    unlabelled, labelled = config.training.batch_sizes
    return unlabelled * terms.needs_negatives + labelled * terms.needs_conditional_negatives


def buffer_classes(config: Config, num_classes: int) -> int:
    """The buffer's class axis: 1 unless some chain is class-conditional."""
    conditional = config.sampler.class_conditional or weights(config).needs_conditional_negatives
    return num_classes if conditional else 1


def init_state(
    config: Config, network: Network, optimizer: optax.GradientTransformation, key: Array, batch: Array
) -> TrainState:
    """The state before the first iteration.

    Args:
      key: the run's PRNG key.
      batch: [B, H, W, C], the first global batch of data, from which act norm starts.
    """
    variables = network.init(jax.random.fold_in(key, 2**31 - 1), batch)
    params = variables.pop("params")
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
        ema=params if config.optimizer.ema_decay else None,
        key=key,
        learning_rate_factor=jnp.float32(1),
        watch=divergence.quiet(),
        window=_empty_window(weights(config)),
    )


def limits(config: Config) -> divergence.Limits:
    """What the watch holds for healthy."""
    settings = config.recovery
    max_rms = settings.max_clipped_rms if config.sampler.clip_x else settings.max_rms
    return divergence.Limits(settings.max_gap, settings.min_spread, max_rms, settings.patience)


def sgld_settings(config: Config) -> dict[str, Any]:
    """The keyword arguments of `sgld.chain` but for the number of steps."""
    sampler = config.sampler
    return {
        "step_size": sampler.step_size,
        "noise_std": sampler.noise_std,
        "grad_clip": sampler.grad_clip or None,
        "bounds": (-1.0, 1.0) if sampler.clip_x else None,
    }


def build(
    config: Config, network: Network, optimizer: optax.GradientTransformation, num_classes: int, streamed: bool = False
) -> Step:
    """The training step, mapped over devices; the buffer [devices, S, C · H · W · channels] is donated.

    Args:
      streamed: the step is given `StreamedBatch`es rather than `ResidentData`.
    """
    terms = weights(config)

    def step(state: TrainState, buffer: Array | None, data: TrainingData) -> tuple[TrainState, Array | None]:
        if buffer is not None:
            buffer = buffer.reshape(len(buffer), -1, *data.images.shape[1:])
        step_keys = _Keys(*jax.random.split(jax.random.fold_in(state.key, state.step), len(_Keys._fields)))
        variables = {**state.model_state, "params": state.params}
        raw_labelled, labels = _raw_batch(config, data, True, state.step)
        labelled = _augmented(config, _own(config, step_keys.augment_labelled, True), raw_labelled, plain=False)
        marginal, conditional = _sample(config, network, variables, buffer, labels, num_classes, data.starts, step_keys)
        inputs = {"labelled": labelled}
        if marginal is not None:
            inputs["negatives"] = marginal.x
        if conditional is not None:
            inputs["conditional_negatives"] = conditional.x
        # Images of the data come last: the last pass makes nine tenths of the running statistics of batch norm.
        if marginal is not None and not config.objective.share_batch:
            raw, _ = _raw_batch(config, data, False, state.step)
            own = _own(config, step_keys.augment, False)
            inputs["data"] = _augmented(config, own, raw, plain=not config.data.augment_p_x)
        else:
            inputs["labelled"] = inputs.pop("labelled")

        def loss(params: Any) -> tuple[Array, tuple[dict[str, Array], Variables]]:
            dropout_key = jax.random.fold_in(step_keys.dropout, devices.index())
            logits, model_state = network.train_logits(
                {**variables, "params": params}, list(inputs.values()), dropout_key
            )
            named = dict(zip(inputs, logits, strict=True))
            named.setdefault("data", named["labelled"])
            value, metrics = objective.joint_loss(objective.Logits(**named), labels, terms)
            return value, (metrics, model_state)

        gradients, (metrics, model_state) = jax.grad(loss, has_aux=True)(state.params)
        if config.optimizer.sam_rho:
            # All devices must climb to the same point, which takes an all-reduce of its own. The second pass's batch
            # statistics are dropped, as released.
            climbed = sam.ascend(
                state.params, devices.mean(gradients), config.optimizer.sam_rho, config.optimizer.sam_adaptive
            )
            gradients = jax.grad(loss, has_aux=True)(climbed)[0]
        log_px_max = metrics.pop("log_px_max")
        samples = [inputs[name] for name in ("negatives", "conditional_negatives") if name in inputs]
        moments = divergence.moments(inputs.get("data", inputs["labelled"]), samples)
        found = (gradients, model_state, metrics)
        signs = divergence.signs(found, log_px_max, config.training.max_log_density, moments)
        gradients, model_state, metrics, signs = devices.mean((*found, signs))
        state, undo = _updated(config, optimizer, state, gradients, model_state, metrics, signs)
        for negatives in (marginal, conditional):
            if negatives is not None:
                assert buffer is not None
                buffer = replay_buffer.write(
                    buffer, negatives.slots, negatives.x, labels=negatives.labels, discard=undo
                )
        return state, None if buffer is None else buffer.reshape(len(buffer), -1)

    axes: Any = (0, 0, 0, 0, None)
    data_axes = StreamedBatch(*axes) if streamed else None
    return devices.per_device(step, in_axes=(None, 0, data_axes), out_axes=(None, 0), donate_argnums=(1,))


def _own(config: Config, key: Array, labelled: bool) -> Array:
    """Keys of this device's examples in the batch of a stream."""
    size = config.training.batch_sizes[labelled] // devices.count()
    return prng.for_examples(key, size, devices.index() * size)


def _raw_batch(config: Config, data: TrainingData, labelled: bool, step: Array) -> tuple[Array, Array]:
    """This device's images [b, H, W, C] uint8 and labels [b] of an iteration, of one of the two streams."""
    if isinstance(data, StreamedBatch):
        return (data.labelled_images, data.labelled_labels) if labelled else (data.images, data.labels)
    order = data.labelled_order if labelled else data.order
    batch_size = config.training.batch_sizes[labelled]
    local = batch_size // devices.count()
    start = step % (order.shape[0] // batch_size) * batch_size + devices.index() * local
    rows = jax.lax.dynamic_slice(order, (start,), (local,))
    return data.images[rows], data.labels[rows]


def _augmented(config: Config, example_keys: Array, images: Array, plain: bool) -> Array:
    """uint8 images as float32 ones in [-1, 1], augmented, or with the input noise alone where they are to be plain."""
    settings = config.data

    def one(key: Array, image: Array) -> Array:
        return augment(
            key,
            image,
            pad=0 if plain else settings.pad,
            pad_mode=settings.pad_mode,
            flip=settings.flip and not plain,
            noise_std=settings.input_noise,
        )

    return jax.vmap(one)(example_keys, to_float(images))


def _fresh(example_keys: Array, shape: tuple[int, ...], starts: Array | None, classes: Array | None) -> Array:
    """Where chains start afresh [b, H, W, C]: U(-1, 1), or one of the epoch's starts, of the chain's class if any."""
    if starts is None:
        return replay_buffer.uniform(example_keys, example_keys.shape[0], shape)

    def one(key: Array, label: Array | int) -> Array:
        row_key, class_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, starts.shape[0])
        return starts[row, jax.random.randint(class_key, (), 0, starts.shape[1]) if classes is None else label]

    return jax.vmap(one, (0, None if classes is None else 0))(example_keys, 0 if classes is None else classes)


def _sample(
    config: Config,
    network: Network,
    variables: Variables,
    buffer: Array | None,
    labels: Array,
    num_classes: int,
    starts: Array | None,
    step_keys: _Keys,
) -> tuple[_Negatives | None, _Negatives | None]:
    """Negatives of p(x) and of p(x | labels), as far as the objective needs them."""
    terms = weights(config)
    # Dropout, where there is any, goes with the batch's statistics: one mask for the whole chain.
    mask_key = jax.random.fold_in(step_keys.dropout, devices.index())
    variables = network.cast(variables)

    def logits_fn(x: Array) -> Array:
        if config.sampler.batch_statistics:
            return network.batch_logits(variables, x, mask_key)
        return network.logits(variables, x)

    def conditional_density(classes: Array) -> energy.LogDensity:
        return energy.conditional(logits_fn, classes)

    def run(
        key: Array, density: Callable[[Any], energy.LogDensity], classes: Array | None, labelled: bool
    ) -> _Negatives:
        assert buffer is not None
        draw_keys, fresh_keys, chain_keys = (_own(config, k, labelled) for k in jax.random.split(key, 3))
        fresh = _fresh(fresh_keys, buffer.shape[2:], starts, classes)
        start = replay_buffer.draw(draw_keys, buffer, fresh, reinit_prob=config.sampler.reinit_prob, labels=classes)

        def ends(part: tuple[Array, Array, Array | None]) -> Array:
            part_keys, x, part_classes = part
            settings: dict[str, Any] = {"num_steps": config.sampler.num_steps, "unroll": config.sampler.unroll}
            return sgld.chain(part_keys, density(part_classes), x, **settings, **sgld_settings(config))

        batch = (chain_keys, start.x, classes)
        x = ends(batch) if config.sampler.batch_statistics else in_parts(ends, batch, start.x.shape)
        return _Negatives(jax.lax.stop_gradient(x), start.slots, classes)

    marginal = conditional = None
    if terms.needs_negatives:
        if buffer is not None and buffer.shape[1] > 1:
            own = _own(config, step_keys.classes, False)
            classes = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(own)
        else:
            classes = None
        of_class = config.sampler.class_conditional and classes is not None
        density = conditional_density if of_class else lambda _: energy.marginal(logits_fn)
        marginal = run(step_keys.marginal, density, classes, labelled=False)
    if terms.needs_conditional_negatives:
        conditional = run(step_keys.conditional, conditional_density, labels, labelled=True)
    return marginal, conditional


def _updated(
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Any,
    model_state: Variables,
    metrics: dict[str, Array],
    signs: divergence.Signs,
) -> tuple[TrainState, Array]:
    """The state after the iteration, or the old one with only its count moved on; and which of the two it is."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    # The learning rate is the last factor of either rule.
    updates = jax.tree.map(lambda update: update * state.learning_rate_factor, updates)
    params = optax.apply_updates(state.params, updates)
    not_finite, runaway = signs.not_finite > 0, signs.runaway > 0
    undo = not_finite | runaway
    metrics = metrics | divergence.measures(signs.moments)
    watch = divergence.watched(state.watch, state.step, not_finite, runaway, metrics, limits(config))
    decay = config.optimizer.ema_decay
    ema = optax.incremental_update(params, state.ema, 1 - decay) if decay else None
    old = (state.params, state.model_state, state.opt_state, state.ema)
    new = (params, model_state, opt_state, ema)
    params, model_state, opt_state, ema = jax.tree.map(
        lambda old, new: jnp.where(undo, old, new).astype(old.dtype), old, new
    )
    state = state._replace(
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        ema=ema,
        watch=watch,
        window=_extended(state.window, state.step, metrics, config.training.log_every),
    )
    return state, undo


def _extended(window: Window, step: Array, metrics: dict[str, Array], log_every: int) -> Window:
    fresh = step % log_every == 0
    sums = {name: jnp.where(fresh, 0, total) + metrics[name] for name, total in window.sums.items()}
    return Window(sums, jnp.where(fresh, 0, window.steps) + 1)


def _empty_window(terms: objective.Weights) -> Window:
    def metrics() -> dict[str, Array]:
        one = jnp.zeros((1, 2))
        found = objective.joint_loss(objective.Logits(one, one, one, one), jnp.zeros(1, jnp.int32), terms)[1]
        return found | divergence.measures(divergence.moments(one, [one] if terms.needs_samples else []))

    # The largest |log p~| only guards the iteration: a mean of it would depend on the number of devices.
    sums = {name: jnp.float32(0) for name in jax.eval_shape(metrics) if name != "log_px_max"}
    return Window(sums, jnp.int32(0))
