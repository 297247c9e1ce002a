"""A trained model read back, from its workdir or from a model folder."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax.common import paths
from jem_jax.common.errors import UserError
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import processes
from jem_jax.runs import checkpoint, model_folder, workdir
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import network, optimizer, quantities
from jem_jax.training.network import Network, Variables
from jem_jax.training.state import TrainState, init_state
from jem_jax.training.statistics import COLLECTION

Array = jax.Array


@dataclasses.dataclass(eq=False)
class Logits:
    """x [B, H, W, C] float in [-1, 1] -> logits [B, K]; works under jit, grad, vmap and pmap."""

    network: Network
    variables: Variables
    image_shape: tuple[int, int, int]
    num_classes: int
    by_batch: bool
    """whether training's last chains used the statistics of their batch"""

    def __call__(self, x: Array) -> Array:
        """Logits in evaluation mode, of each image on its own.

        Raises:
          UserError: images of another shape, or integers.
        """
        images = self._checked(x)
        return self.network.logits(self.variables, images) if len(images) else self._none()

    def in_chains(self, x: Array) -> Array:
        """Logits for SGLD steps, as in training's last chains. Errors are those of a call.

        With `config.sampler.batch_statistics`, unless training froze batch norm, it uses the statistics of these
        images, of which there should be 20 or more. Otherwise the result is that of a call.
        """
        images = self._checked(x)
        if not self.by_batch:
            return self(images)
        return self.network.batch_logits(self.variables, images, jax.random.key(0)) if len(images) else self._none()

    def _checked(self, x: Array) -> Array:
        images = jnp.asarray(x)
        if images.shape[1:] != self.image_shape or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"logits takes floats [B, {', '.join(map(str, self.image_shape))}] in [-1, 1], not {images.dtype} "
                f"{list(images.shape)}; jem_jax.augment.to_float turns uint8 images into them"
            )
        return images

    def _none(self) -> Array:
        return jnp.zeros((0, self.num_classes), jnp.float32)


class Loaded(NamedTuple):
    """A trained model for use in other code."""

    logits: Logits
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


class Arrays(NamedTuple):
    """The arrays of a trained model."""

    variables: Variables
    """those of the evaluation, float32"""
    buffer: np.ndarray | None
    """[S, classes or 1, H, W, C] float32"""
    step: int
    """iterations that it took"""


def load(path: str | os.PathLike[str], *, baseline: bool = False, best: bool = False) -> Loaded:
    """See `jem_jax.load`."""
    folder = paths.local("the workdir", os.fspath(path))
    with processes.own_settings():
        facts = read_facts(folder)
        model = read_model(folder, facts, baseline=baseline, best=best)
        variables, buffer = jax.device_put((model.variables, model.buffer))
    by_batch = quantities.chains_by_batch(facts.config)
    return Loaded(
        Logits(model.network, variables, facts.image_shape, facts.num_classes, by_batch), buffer, facts.config
    )


def find_facts(path: Path) -> RunFacts | None:
    """The facts of a workdir or a model folder, None where it is neither. Errors are those of `read_facts`."""
    return model_folder.describe(path).facts if model_folder.is_one(path) else workdir.find_facts(path)


def read_facts(path: Path) -> RunFacts:
    """The facts of a workdir or a model folder.

    Raises:
      UserError: it is neither, or what it says of itself is damaged.
    """
    return model_folder.describe(path).facts if model_folder.is_one(path) else workdir.read_facts(path)


def read_model(path: Path, facts: RunFacts, *, baseline: bool = False, best: bool = False) -> Model:
    """The network and variables of a run's last (or best) checkpoint, or of a model folder.

    Raises:
      UserError: there is no finished checkpoint, it is damaged, or it does not fit the settings.
    """
    arrays = read_arrays(path, facts, baseline=baseline, best=best)
    # Chains with batch statistics pass in training mode, which would drop units.
    net = network.build(dataclasses.replace(facts.config.model, dropout=0.0), facts.num_classes)
    return Model(net, net.cast(arrays.variables), arrays.buffer, arrays.step)


def read_arrays(path: Path, facts: RunFacts, *, baseline: bool = False, best: bool = False) -> Arrays:
    """The arrays of the model that `read_model` gives. Errors are the same."""
    config = quantities.classifier_config(facts.config) if baseline else facts.config
    state, buffer = template(config, facts.image_shape, facts.num_classes)
    if model_folder.is_one(path):
        if baseline or best:
            raise UserError(
                f"{path} is a model folder: it holds one model, and neither a baseline nor a best checkpoint"
            )
        return _from_folder(path, facts, state)
    directory = (path / workdir.BASELINE if baseline else path) / (workdir.BEST if best else workdir.CHECKPOINTS)
    restored = checkpoint.restore(directory, tree(checkpoint.template_of(state), None if best else buffer))
    variables = checkpoint.from_tree(state, restored.tree["state"]).evaluation_variables
    return Arrays(variables, restored.tree.get("buffer"), restored.step)


def identity(path: Path, step: int, *, baseline: bool = False) -> str:
    """A text that identifies the model that `read_model` reads: hashes of its files."""
    if model_folder.is_one(path):
        return json.dumps(model_folder.describe(path).sha256, sort_keys=True)
    folder = path / workdir.BASELINE if baseline else path
    return (folder / workdir.CHECKPOINTS / str(step) / "manifest.json").read_text(encoding="utf-8")


def _from_folder(path: Path, facts: RunFacts, state: TrainState) -> Arrays:
    variables, buffer = model_folder.read(path)
    difference = checkpoint.difference(state.evaluation_variables, variables)
    if difference is None and buffer is not None and buffer.shape[2:] != facts.image_shape:
        difference = f"holds chains of shape {buffer.shape[2:]}; its images are {facts.image_shape}"
    if difference:
        raise UserError(f"model folder {path} does not hold the network of its settings: it {difference}")
    return Arrays(variables, buffer, model_folder.describe(path).iteration)


def begin_from(config: Config, dataset: Dataset, state: TrainState) -> tuple[TrainState, np.ndarray | None]:
    """A run's first state with the parameters of the model at `training.init_from`.

    Parameters, averaged ones, and batch statistics are the source's; the optimiser starts afresh.

    Args:
      state: a state of this run before its first iteration, or its shapes.

    Returns:
      The state, and the source's buffer; None where it has none of this run's shape.

    Raises:
      UserError: there is no model, it is damaged, or another network's: with the first array that differs.
    """
    path = _source(config)
    try:
        arrays = read_arrays(path, read_facts(path))
    except UserError as error:
        raise UserError(f"config.training.init_from: {error}") from error
    difference = checkpoint.difference(state.evaluation_variables, arrays.variables)
    if difference:
        raise UserError(f"config.training.init_from {path} is of another network: it {difference}")
    expected = (*quantities.buffer_size(config, dataset.num_classes), *dataset.image_shape)
    fits = arrays.buffer is not None and arrays.buffer.shape == expected
    return with_variables(state, arrays.variables), arrays.buffer if fits else None


def _source(config: Config) -> Path:
    return paths.local("config.training.init_from", config.training.init_from)


def with_variables(state: TrainState, variables: Variables) -> TrainState:
    """A run's first state with other variables. The optimiser's first state does not depend on them."""
    params = variables["params"]
    collections = {name: value for name, value in variables.items() if name != "params"}
    return state._replace(
        params=params,
        model_state=collections,
        ema=None if state.ema is None else params,
        evaluation_stats=None if state.evaluation_stats is None else collections[COLLECTION],
    )


def check_source(config: Config, dataset: Dataset, path: Path) -> None:
    """Checks that a new run in a workdir can start from `training.init_from`.

    Raises:
      UserError: as `begin_from`; or it would start from itself.
    """
    source = _source(config)
    if source.resolve() == path.resolve():
        raise UserError(f"config.training.init_from {source} is the workdir itself; name another with --workdir")
    begin_from(config, dataset, template(config, dataset.image_shape, dataset.num_classes)[0])


def template(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> tuple[TrainState, Any]:
    """Shapes of a run's state and whole buffer (None where there is none), without computing anything."""
    net = network.build(config.model, num_classes)
    rule = optimizer.build(config.optimizer, 1)
    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key, x: init_state(config, net, rule, key, x), key, image)
    slots, classes = quantities.buffer_size(config, num_classes)
    return state, jax.ShapeDtypeStruct((slots, classes, *image_shape), jnp.float32) if slots else None


def tree(state: Any, buffer: Any) -> dict[str, Any]:
    """The tree of a checkpoint."""
    return {"state": state} if buffer is None else {"state": state, "buffer": buffer}
