"""What can be known of a network and an iteration before anything is computed: JAX traces them on shapes alone."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jem_jax.common.errors import UserError
from jem_jax.config import Config
from jem_jax.distributed import devices
from jem_jax.distributed.devices import AXIS
from jem_jax.runs import checkpoint
from jem_jax.training import quantities
from jem_jax.training.network import Network, Variables
from jem_jax.training.state import TrainingData, TrainState
from jem_jax.training.statistics import COLLECTION
from jem_jax.training.step import Step

Array = jax.Array

_FEW = 8
"""images whose statistics batch norm can use"""
_SMALL, _LARGE = 2, 4
"""images of the batches that a network is tried on; what it keeps must not depend on their number"""


def check_network(network: Network, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Traces a network as a run uses it: started, evaluated and trained, on batches of two sizes.

    Raises:
      UserError: it does not take such images, or does not give [B, num_classes] logits; it cannot be evaluated or
        trained; or a layer of it would stay in evaluation mode while it trains.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    small, large = (jax.ShapeDtypeStruct((size, *image_shape), jnp.float32) for size in (_SMALL, _LARGE))
    with _refused(f"does not take images of {'×'.join(map(str, image_shape))}"):
        variables = jax.eval_shape(network.init, key, small)
    with _refused("cannot be evaluated"):
        _check_logits(jax.eval_shape(network.evaluation_pass, variables, large), num_classes)
    _check_parameters(variables["params"])
    evaluating: set[str] = set()

    def train(variables: Variables, x: Array, key: Array) -> tuple[Array, Variables]:
        with nn.intercept_methods(functools.partial(_note_evaluating, evaluating)):
            return network.train_pass(variables, x, key)

    with _refused("cannot be trained"):
        program, (_, state) = jax.make_jaxpr(train, axis_env=[(AXIS, 1)], return_shape=True)(variables, large, key)
    before = {name: value for name, value in variables.items() if name != "params"}
    difference = checkpoint.difference(before, state, with_dtypes=False)
    if difference:
        raise UserError(f"config.model cannot be trained: after a pass its state {difference}")
    taken = {id(variable) for variable in program.jaxpr.invars}
    statistics = jax.tree.unflatten(jax.tree.structure(state), program.jaxpr.outvars[1:]).get("batch_stats", {})
    if statistics and all(id(variable) in taken for variable in jax.tree.leaves(statistics)):
        evaluating.add("batch_stats")
    if evaluating:
        raise UserError(
            f"config.model would stay in evaluation mode while it trains ({', '.join(sorted(evaluating))}); its "
            "__call__ must take train, training, deterministic or use_running_average, and hand it to such layers"
        )


def check_step(step: Step, state: TrainState, buffer: Array | None, data: TrainingData, template: TrainState) -> None:
    """Traces an iteration and compares what it returns with what a checkpoint can hold.

    Args:
      template: the shapes of a run's state.

    Raises:
      UserError: the iteration cannot be traced, or its state or buffer has another structure, shape or dtype.
    """
    with _refused("cannot be trained"):
        after, rows = jax.eval_shape(step, state, buffer, data)
    differs = checkpoint.difference(checkpoint.template_of(template), checkpoint.template_of(after))
    if not differs and buffer is not None:
        differs = checkpoint.difference({"buffer": buffer}, {"buffer": rows})
    if differs:
        raise UserError(f"config.model cannot be trained: after an iteration the state {differs}")


def few_images(config: Config, model_state: Variables) -> str | None:
    """What to say of batches so small on each device that batch norm's statistics, which are its own, are noise."""
    unlabelled, labelled = config.training.batch_sizes
    smallest = min(unlabelled, labelled) if quantities.weights(config).needs_samples else labelled
    count = devices.count()
    if COLLECTION not in model_state or smallest >= _FEW * count:
        return None
    return (
        f"warning: batch norm sees {smallest // count} images on each of {count} devices; below {_FEW} its statistics "
        f"are noise. Use batches of at least {_FEW * count}, or fewer devices"
    )


def long_warmup(config: Config, total_steps: int) -> str | None:
    """What to say of a run that ends while its learning rate still rises."""
    steps, rate = config.optimizer.warmup_steps, config.optimizer.learning_rate
    if steps <= total_steps:
        return None
    return (
        f"warning: config.optimizer.warmup_steps is {steps} and the run has {total_steps} iterations; its learning "
        f"rate only reaches {rate * total_steps / steps:.3g} of {rate:g}"
    )


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """What somebody's network raises, said in a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"config.model {what}: {first}") from error


def _check_logits(logits: Any, num_classes: int) -> None:
    is_array = isinstance(logits, jax.ShapeDtypeStruct)
    if not is_array or logits.shape != (_LARGE, num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
        found = f"{logits.dtype} {list(logits.shape)}" if is_array else type(logits).__name__
        raise UserError(f"config.model must give logits [{_LARGE}, {num_classes}] for {_LARGE} images, not {found}")


def _check_parameters(params: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise UserError("config.model has no parameters, so there is nothing to train")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"config.model has a parameter that is no float, {name} ({leaf.dtype}); keep it in a collection of "
                "its own, with self.variable"
            )


def _note_evaluating(
    found: set[str],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Adds the path of a layer that is called as in evaluation, as Flax's own layers are told that."""
    module = context.module
    if context.method_name == "__call__" and not isinstance(module, nn.SpectralNorm):
        given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments
        for name in ("deterministic", "use_running_average"):
            value = given.get(name)
            value = getattr(module, name, None) if value is None else value
            idle = name == "deterministic" and not (getattr(module, "rate", 0) or getattr(module, "dropout_rate", 0))
            if value is True and not idle:
                found.add("/".join(module.path) or type(module).__name__)
    return call(*args, **kwargs)
