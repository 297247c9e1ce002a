"""optax: the update rule and the learning rate's schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jem_jax.config import Optimizer

Array = jax.Array

_RISING = 0.3
"""share of a one-cycle schedule in which the rate rises (PyTorch's default)"""


def schedule(
    settings: Optimizer, steps_per_epoch: int, shape: str = "steps", total_steps: int = 1
) -> Callable[[Array | int], Array]:
    """Learning rate of an iteration: linear warm-up from 0, times a schedule.

    Args:
      shape: "steps", times `decay_factor` at each of `decay_epochs`; "linear" or "cosine", to 0 after `total_steps`;
        "one_cycle", a cosine up from 1/25 of the rate over the first three tenths and down to 0 (Smith 2018).
      total_steps: iterations of the run.
    """
    rate = settings.learning_rate
    edges = np.asarray(settings.decay_epochs, np.float32) * steps_per_epoch

    def steps(step: Array | int) -> Array:
        # An array without elements, from outside a mapped step, ends XLA's compiler with a segmentation fault (jaxlib
        # 0.11.2).
        passed = jnp.sum(jnp.asarray(step) >= edges) if settings.decay_epochs else 0
        return jnp.float32(rate) * settings.decay_factor**passed

    shapes: dict[str, Callable[..., Array]] = {
        "steps": steps,
        "linear": optax.linear_schedule(rate, 0.0, total_steps),
        "cosine": optax.cosine_decay_schedule(rate, total_steps),
        "one_cycle": optax.cosine_onecycle_schedule(total_steps, rate, _RISING),
    }

    def learning_rate(step: Array | int) -> Array:
        warm = jnp.minimum(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
        return jnp.float32(shapes[shape](step) * warm)

    return learning_rate


def build(
    settings: Optimizer, steps_per_epoch: int, shape: str = "steps", total_steps: int = 1
) -> optax.GradientTransformation:
    """Adam, or SGD with momentum. The gradient is clipped first; weight decay is then added, as PyTorch's optimisers
    do.

    Raises:
      ValueError: there is no rule of that name.
    """
    rules = {
        "adam": optax.scale_by_adam(settings.beta1, settings.beta2),
        "sgd": optax.trace(settings.momentum),
    }
    if settings.name not in rules:
        raise ValueError(f"optimizer.name must be one of {', '.join(rules)}, not {settings.name!r}")
    decay = optax.add_decayed_weights(settings.weight_decay) if settings.weight_decay else optax.identity()
    return optax.chain(
        optax.chain(optax.clip_by_global_norm(settings.clip_norm), decay) if settings.clip_norm else decay,
        rules[settings.name],
        optax.scale_by_learning_rate(schedule(settings, steps_per_epoch, shape, total_steps)),
    )
