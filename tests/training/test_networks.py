"""Networks as people write them: they train as their authors mean, or are refused before a run begins."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jem_jax.common.errors import UserError
from jem_jax.config import Model
from jem_jax.distributed import devices
from jem_jax.runs import checkpoint
from jem_jax.training import network, preflight

SHAPE = (tiny.SIDE, tiny.SIDE, 1)


def _layers(module, x, norm=None, dropout=None):
    x = nn.Dense(8, name="hidden")(x.reshape(len(x), -1))
    x = x if norm is None else nn.BatchNorm(name="norm", **norm)(x)
    x = x if dropout is None else nn.Dropout(0.5, name="dropout", **dropout)(x)
    return nn.Dense(module.num_classes, name="classes")(x)


def _both(module, x, evaluates):
    return _layers(module, x, {"use_running_average": evaluates}, {"deterministic": evaluates})


class Module(nn.Module):
    num_classes: int


def _module(call):
    """A module whose `__call__` is a function."""
    return type("Called", (Module,), {"__call__": nn.compact(call), "__module__": __name__})


CALLS = {
    "TrainTrue": lambda self, x, train=True: _both(self, x, not train),
    "TestFlag": lambda self, x, scale=1.0, *, test: scale * _both(self, x, test),
}
"""How networks say that they train."""


class MutableCollection(Module):
    """It trains where its statistics can be written."""

    @nn.compact
    def __call__(self, x, enable_dropout=None):
        evaluates = not self.is_mutable_collection("batch_stats")
        return _layers(self, x, {"use_running_average": evaluates}, {"deterministic": not enable_dropout})


class MergedField(Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        return _both(self, x, nn.merge_param("deterministic", self.deterministic, deterministic))


def remat(num_classes):
    """A flag that must be given by place."""
    module = _module(lambda self, x, train: _both(self, x, not train))
    return nn.remat(module, static_argnums=(2,))(num_classes)


def jit(num_classes):
    """A flag that must be given by name."""
    return nn.jit(_module(lambda self, x, *, train: _both(self, x, not train)), static_argnames=("train",))(num_classes)


IMAGES = np.random.default_rng(1).uniform(0, 1, (4, *SHAPE)).astype(np.float32)


def _passes(factory):
    """A network's variables and those after a training pass of the images; logits [3, 4, K] of such passes, the first
    two with the same key; and logits in evaluation with what the pass left, of the images, and of the first alone."""
    net = network.Network(factory(num_classes=tiny.CLASSES))
    preflight.check_network(net, SHAPE, tiny.CLASSES)

    @jax.jit
    def passes(x, seeds):
        keys = jax.vmap(jax.random.key)(seeds)
        before = net.init(keys[0], x)
        logits, states = jax.vmap(net.train_pass, (None, None, 0), axis_name=devices.AXIS)(before, x, keys)
        after = {**jax.tree.map(lambda leaf: leaf[0], states), "params": before["params"]}
        return before, after, logits, net.logits(after, x), net.logits(after, x[:1])

    found = jax.device_get(passes(IMAGES, np.array([0, 0, 1])))
    np.testing.assert_array_equal(*found[2][:2])
    return found


FACTORIES = {name: _module(call) for name, call in CALLS.items()}
FACTORIES |= {one.__name__: one for one in (MutableCollection, MergedField, remat, jit)}


@pytest.mark.parametrize("name", FACTORIES)
def test_trains_and_evaluates_as_written(name):
    _, after, training, evaluation, alone = _passes(FACTORIES[name])
    assert abs(after["batch_stats"]["norm"]["mean"]).max() > 0
    assert np.any(training[0] != training[2])
    # Each example on its own, so from running statistics.
    np.testing.assert_allclose(alone, evaluation[:1], atol=1e-5)


class StreamAsked(Module):
    """It trains where it is given a stream, and asks for another and for one without a name."""

    @nn.compact
    def __call__(self, x):
        x = _layers(self, x)
        if self.has_rng("drop_path"):
            x = x * jax.random.bernoulli(self.make_rng("noise"), 0.5, (len(x), 1))
            x = x + jax.random.normal(self.make_rng(), x.shape)
        return x


def test_every_stream_has_a_key():
    before, _, training, evaluation, _ = _passes(StreamAsked)
    assert np.any(training[0] != training[2])
    hidden, classes = (before["params"][name] for name in ("hidden", "classes"))
    plain = (IMAGES.reshape(4, -1) @ hidden["kernel"] + hidden["bias"]) @ classes["kernel"] + classes["bias"]
    np.testing.assert_allclose(evaluation, plain, atol=1e-5)


class Nnx(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.classes = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.classes(x.reshape(len(x), -1))


def nnx_itself(num_classes):
    return Nnx(num_classes, rngs=nnx.Rngs(0))


def test_an_nnx_module_is_one_as_a_linen_one_is():
    before, _, training, _, _ = _passes(functools.partial(nnx.bridge.to_linen, Nnx))
    classes = before["params"]["classes"]
    np.testing.assert_allclose(training[0], IMAGES.reshape(4, -1) @ classes["kernel"] + classes["bias"], atol=1e-5)
    with pytest.raises(UserError, match=r"not Nnx; flax.nnx.bridge.to_linen makes one"):
        network.build(Model(factory=f"{__name__}:nnx_itself"), 3)


class Everything(Module):
    """Parameters in bfloat16, a count of passes, a mean in float16 that is computed in float32, a switch, a stream of
    its own, and batch norm over all devices."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("counts", "passes", jnp.int32, 0)
        mean = self.variable("statistics", "mean", jnp.zeros, (), jnp.float16)
        seen = self.variable("counts", "seen", jnp.zeros, (), bool)
        if train:
            count.value += 1
            mean.value = 0.5 * mean.value + 0.5 * jnp.mean(x) + 1
            seen.value = jnp.array(True)
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        x = nn.BatchNorm(not train, axis_name="batch")(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name="classes")(x)


def test_counts_and_precisions_stay_what_they_are():
    settings = {"optimizer.name": "adam", "optimizer.ema_decay": 0.5}
    start = tiny.start(tiny.config(**{"model.factory": f"{__name__}:Everything", **settings}))
    preflight.check_network(start.network, SHAPE, tiny.CLASSES)
    state, buffer = start.state, start.buffer
    step = preflight.trace(start.step, state, buffer, start.data.at(0)).compile()
    for number in range(2):
        state, buffer = step(state, buffer, start.data.at(number))
    assert checkpoint.difference(checkpoint.template_of(start.state), checkpoint.template_of(state)) is None
    # Three passes an iteration: negatives, labelled images and those of p(x).
    assert int(state.model_state["counts"]["passes"]) == 6
    assert bool(state.model_state["counts"]["seen"])
    assert state.model_state["statistics"]["mean"].dtype == jnp.float16
    assert 1 < float(state.model_state["statistics"]["mean"]) < 2.5
    for params in (state.params, state.ema):
        assert {leaf.dtype for leaf in jax.tree.leaves(params["classes"])} == {jnp.dtype(jnp.bfloat16)}
    assert tiny.differing(start.state.params, state.params) == sorted(tiny.leaves(state.params))
    logits = jax.eval_shape(start.network.logits, state.evaluation_variables, jnp.zeros((2, *SHAPE)))
    assert logits.dtype == jnp.float32


class Changing(nn.Module):
    """Its count becomes a row of one as soon as it is trained."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        count = self.variable("counts", "passes", jnp.zeros, (), jnp.int32)
        if train and not self.is_initializing():
            count.value = count.value.reshape(1) + 1
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def test_what_a_checkpoint_cannot_hold_is_refused():
    start = tiny.start(tiny.config(**{"model.factory": f"{__name__}:Changing"}))
    with pytest.raises(UserError, match="after an iteration the state holds model_state/counts/passes as"):
        preflight.trace(start.step, start.state, start.buffer, start.data.at(0))


def _own_norm(self, x, fit=False):
    """Statistics that no layer of Flax keeps, and a flag that nobody knows."""
    mean = self.variable("batch_stats", "mean", jnp.zeros, ())
    if fit:
        mean.value = jnp.mean(x)
    return _layers(self, x - mean.value)


def _sown(self, x):
    self.sow("losses", "l2", jnp.mean(x))
    return _layers(self, x)


def _own_axis(self, x, train=False):
    x = _layers(self, x)
    return x - jax.lax.pmean(x, "hosts") if train else x


REFUSED = {
    "has no parameters, so there is nothing to train": (
        lambda self, x: jnp.zeros((len(x), self.num_classes)) + x.sum((1, 2))
    ),
    "has a parameter that is no float, scale (int32)": (
        lambda self, x: _layers(self, x) * self.param("scale", lambda key: jnp.int32(2))
    ),
    "would stay in evaluation mode while it trains (batch_stats, norm); its __call__ must take train,": (
        lambda self, x, mode="eval": _layers(self, x, {"use_running_average": mode == "eval"})
    ),
    "would stay in evaluation mode while it trains (dropout)": (
        lambda self, x, dropping=False: _layers(self, x, None, {"deterministic": not dropping})
    ),
    "would stay in evaluation mode while it trains (batch_stats)": _own_norm,
    "cannot be trained: after a pass its state holds losses/l2/1": _sown,
    'cannot be evaluated: None needs PRNG for "noise"': (
        lambda self, x: _layers(self, x) + jax.random.normal(self.make_rng("noise"), (len(x), 1))
    ),
    "cannot be trained: Found an unbound axis name: hosts": _own_axis,
    "must give logits [4, 3] for 4 images, not tuple": lambda self, x: (_layers(self, x), x),
    "must give logits [4, 3] for 4 images, not int32 [4, 3]": lambda self, x: _layers(self, x).astype(jnp.int32),
    "does not take images of 8×8×1": lambda self, x, y: _layers(self, x + y),
}


@pytest.mark.parametrize(("said", "call"), REFUSED.items())
def test_is_refused_before_a_run_begins(said, call):
    net = network.Network(_module(call)(num_classes=tiny.CLASSES))
    with pytest.raises(UserError) as caught:
        preflight.check_network(net, SHAPE, tiny.CLASSES)
    assert str(caught.value).startswith(f"config.model {said}")
    assert "\n" not in str(caught.value)
