"""A trained model read back from its workdir."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax.common import paths
from jem_jax.common.errors import UserError
from jem_jax.config import Config
from jem_jax.distributed import processes
from jem_jax.runs import checkpoint, workdir
from jem_jax.training import loop, network, quantities
from jem_jax.training.network import Network, Variables

Array = jax.Array


class Loaded(NamedTuple):
    """A trained model for use in other code."""

    logits: Callable[[Array], Array]
    """x [B, H, W, C] in [-1, 1] -> [B, K]"""
    buffer: Array | None
    """[S, classes or 1, H, W, C] float32, unclipped"""
    config: Config


class Model(NamedTuple):
    """A trained model for evaluation."""

    network: Network
    variables: Variables
    """as `Network.cast` gives them"""
    buffer: np.ndarray | None
    step: int


def load(path: str | os.PathLike[str], *, baseline: bool = False, best: bool = False) -> Loaded:
    """See `jem_jax.load`."""
    folder = paths.local("the workdir", os.fspath(path))
    with processes.own_settings():
        facts = workdir.read_facts(folder)
        model = read_model(folder, facts, baseline=baseline, best=best)
        variables, buffer = jax.device_put((model.variables, model.buffer))

    def logits(x: Array) -> Array:
        images = jnp.asarray(x)
        if images.shape[1:] != facts.image_shape or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"logits takes floats [B, {', '.join(map(str, facts.image_shape))}] in [-1, 1], not {images.dtype} "
                f"{list(images.shape)}; jem_jax.augment.to_float turns uint8 images into them"
            )
        if not len(images):
            return jnp.zeros((0, facts.num_classes), jnp.float32)
        return model.network.logits(variables, images)

    return Loaded(logits, buffer, facts.config)


def read_model(path: Path, facts: workdir.RunFacts, *, baseline: bool = False, best: bool = False) -> Model:
    """The network and variables of a run's last (or best) checkpoint.

    Raises:
      UserError: there is no finished checkpoint, or it is damaged.
    """
    config = quantities.classifier_config(facts.config) if baseline else facts.config
    directory = (path / workdir.BASELINE if baseline else path) / (workdir.BEST if best else workdir.CHECKPOINTS)
    state, buffer = loop.template(config, facts.image_shape, facts.num_classes)
    found = checkpoint.restore(directory, loop.tree(checkpoint.template_of(state), None if best else buffer))
    variables = checkpoint.from_tree(state, found.tree["state"]).evaluation_variables
    # Chains with batch statistics pass in training mode, which would drop units.
    net = network.build(dataclasses.replace(config.model, dropout=0.0), facts.num_classes)
    return Model(net, net.cast(variables), found.tree.get("buffer"), found.step)
