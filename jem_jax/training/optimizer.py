"""optax: the update rule and the learning rate's schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jem_jax.config import Optimizer

Array = jax.Array


def schedule(settings: Optimizer, steps_per_epoch: int) -> Callable[[Array], Array]:
    """Learning rate of an iteration: linear warm-up from 0, times `decay_factor` at each of `decay_epochs`."""
    edges = jnp.asarray(settings.decay_epochs, jnp.float32) * steps_per_epoch

    def learning_rate(step: Array) -> Array:
        rate = jnp.float32(settings.learning_rate)
        # An array without elements, from outside a mapped step, ends XLA's compiler with a segmentation fault (jaxlib
        # 0.11.2).
        if settings.decay_epochs:
            rate *= settings.decay_factor ** jnp.sum(step >= edges)
        if settings.warmup_steps:
            rate *= jnp.minimum(1.0, step / settings.warmup_steps)
        return rate

    return learning_rate


def build(settings: Optimizer, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam, or SGD with momentum; weight decay is added to the gradient, as PyTorch's optimisers do."""
    rule = (
        optax.scale_by_adam(settings.beta1, settings.beta2)
        if settings.name == "adam"
        else optax.trace(settings.momentum)
    )
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay) if settings.weight_decay else optax.identity(),
        rule,
        optax.scale_by_learning_rate(schedule(settings, steps_per_epoch)),
    )
