"""A trained model read back from its workdir."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jem_jax.config import Config
from jem_jax.runs import checkpoint, workdir
from jem_jax.training import loop, network
from jem_jax.training.network import Network, Variables

Array = jax.Array


class Loaded(NamedTuple):
    """A trained model for use in other code."""

    logits: Callable[[Array], Array]
    """x [B, H, W, C] in [-1, 1] -> [B, K]"""
    buffer: np.ndarray | None
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
    facts = workdir.read_facts(Path(path))
    model = read_model(Path(path), facts, baseline=baseline, best=best)
    return Loaded(lambda x: model.network.logits(model.variables, x), model.buffer, facts.config)


def read_model(path: Path, facts: workdir.RunFacts, *, baseline: bool = False, best: bool = False) -> Model:
    """The network and variables of a run's last (or best) checkpoint.

    Raises:
      UserError: there is no finished checkpoint, or it is damaged.
    """
    config = loop.classifier_config(facts.config) if baseline else facts.config
    directory = (path / workdir.BASELINE if baseline else path) / (workdir.BEST if best else workdir.CHECKPOINTS)
    state, buffer = loop.template(config, facts.image_shape, facts.num_classes)
    found = checkpoint.restore(directory, loop.tree(checkpoint.template_of(state), None if best else buffer))
    variables = checkpoint.from_tree(state, found.tree["state"]).evaluation_variables
    # Chains with batch statistics pass in training mode, which would drop units.
    net = network.build(dataclasses.replace(config.model, dropout=0.0), facts.num_classes)
    return Model(net, net.cast(variables), found.tree.get("buffer"), found.step)
