"""Networks as people write them: they train as their authors mean, or are refused before a run begins."""

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


def _module(call, name):
    """A module whose `__call__` is a function."""
    return type(name, (Module,), {"__call__": nn.compact(call), "__module__": __name__, "__test__": False})


def _mutable_collection(self, x, enable_dropout=None):
    evaluates = not self.is_mutable_collection("batch_stats")
    return _layers(self, x, {"use_running_average": evaluates}, {"deterministic": not enable_dropout})


def _axis_name(self, x, train=False):
    norm = {"use_running_average": not train, "axis_name": "batch"}
    return _layers(self, x, norm, {"deterministic": not train})


CALLS = {
    "TrainTrue": lambda self, x, train=True: _both(self, x, not train),
    "TrainRequired": lambda self, x, train: _both(self, x, not train),
    "TrainByName": lambda self, x, *, train: _both(self, x, not train),
    "Training": lambda self, x, training=False: _both(self, x, not training),
    "IsTraining": lambda self, x, is_training: _both(self, x, not is_training),
    "Deterministic": lambda self, x, deterministic=True: _both(self, x, deterministic),
    "DeterministicFalse": lambda self, x, deterministic=False: _both(self, x, deterministic),
    "RunningAverage": lambda self, x, use_running_average=None: _both(self, x, use_running_average),
    "TwoFlags": lambda self, x, use_running_average=True, deterministic=True: _layers(
        self, x, {"use_running_average": use_running_average}, {"deterministic": deterministic}
    ),
    "TestFlag": lambda self, x, scale=1.0, *, test: scale * _both(self, x, test),
    "MutableCollection": _mutable_collection,
    "AxisName": _axis_name,
}
"""How networks say that they train; `MutableCollection` trains where its statistics can be written."""
CALLED = {name: _module(call, name) for name, call in CALLS.items()}
globals().update(CALLED)


class Field(Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return _both(self, x, not self.train)


class MergedField(Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        return _both(self, x, nn.merge_param("deterministic", self.deterministic, deterministic))


def remat(num_classes):
    """A flag that must be given by place."""
    return nn.remat(CALLED["TrainRequired"], static_argnums=(2,))(num_classes)


def jit(num_classes):
    return nn.jit(CALLED["TrainByName"], static_argnames=("train",))(num_classes)


def _trained(factory, steps=1, **settings):
    """A run's start, and the state after some iterations."""
    start = tiny.start(tiny.config(**{"model.factory": f"{__name__}:{factory.__name__}", **settings}))
    preflight.check_network(start.network, SHAPE, tiny.CLASSES)
    state, buffer = start.state, start.buffer
    preflight.trace(start.step, state, buffer, start.data.at(0))
    for step in range(steps):
        state, buffer = start.step(state, buffer, start.data.at(step))
    assert checkpoint.difference(checkpoint.template_of(start.state), checkpoint.template_of(state)) is None
    return start, state


@pytest.mark.parametrize("factory", [*CALLED.values(), Field, MergedField, remat, jit])
def test_trains_and_evaluates_as_written(factory):
    start, state = _trained(factory)
    assert abs(np.asarray(state.model_state["batch_stats"]["norm"]["mean"])).max() > 0
    x = jax.random.uniform(jax.random.key(1), (4, *SHAPE))
    logits = start.network.logits(state.evaluation_variables, x)
    np.testing.assert_array_equal(logits, start.network.logits(state.evaluation_variables, x))
    # Each example on its own, so from running statistics.
    np.testing.assert_allclose(logits[:1], start.network.logits(state.evaluation_variables, x[:1]), atol=1e-5)
    one, same, other = (_training_logits(start, state, x, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def _training_logits(start, state, x, seed):
    run = jax.vmap(start.network.batch_logits, (None, None, 0), axis_name=devices.AXIS)
    return run(state.evaluation_variables, x, jax.random.key(seed)[None])


class DropPath(Module):
    """A stream of its own, as stochastic depth has, and one without a name."""

    @nn.compact
    def __call__(self, x, train=False):
        x = _layers(self, x)
        if train:
            x = x * jax.random.bernoulli(self.make_rng("drop_path"), 0.5, (len(x), 1))
            x = x + jax.random.normal(self.make_rng(), x.shape)
        return x


class StreamAsked(Module):
    """It trains where it is given a stream."""

    @nn.compact
    def __call__(self, x):
        x = _layers(self, x)
        if self.has_rng("drop_path"):
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return x


@pytest.mark.parametrize("factory", [DropPath, StreamAsked])
def test_every_stream_has_a_key(factory):
    start, state = _trained(factory)
    x = jax.random.uniform(jax.random.key(1), (4, *SHAPE))
    one, same, other = (_training_logits(start, state, x, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    np.testing.assert_array_equal(start.network.logits(state.evaluation_variables, x), _plain(state, x))


def _plain(state, x):
    params = state.params
    hidden = x.reshape(len(x), -1) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return hidden @ params["classes"]["kernel"] + params["classes"]["bias"]


class Nnx(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.classes = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.classes(x.reshape(len(x), -1))


def bridged(num_classes):
    return nnx.bridge.to_linen(Nnx, num_classes)


def nnx_itself(num_classes):
    return Nnx(num_classes, rngs=nnx.Rngs(0))


def test_an_nnx_module_trains_as_a_linen_one():
    start, state = _trained(bridged)
    assert tiny.differing(start.state.params, state.params) == ["classes/bias", "classes/kernel"]
    with pytest.raises(UserError, match=r"not Nnx; flax.nnx.bridge.to_linen makes one"):
        network.build(Model(factory=f"{__name__}:nnx_itself"), 3)


class Counter(Module):
    """A count of passes, a mean in float16 that is computed in float32, and a switch."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("counts", "passes", jnp.int32, 0)
        mean = self.variable("statistics", "mean", jnp.zeros, (), jnp.float16)
        seen = self.variable("counts", "seen", jnp.zeros, (), bool)
        if train:
            count.value += 1
            mean.value = 0.5 * mean.value + 0.5 * jnp.mean(x) + 1
            seen.value = jnp.array(True)
        return _layers(self, x)


class HalfParameters(Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x.reshape(len(x), -1))


def test_counts_and_precisions_stay_what_they_are():
    _, state = _trained(Counter, steps=2)
    # Three passes an iteration: negatives, labelled images and those of p(x).
    assert int(state.model_state["counts"]["passes"]) % 2 == 0
    assert int(state.model_state["counts"]["passes"]) > 0
    assert bool(state.model_state["counts"]["seen"])
    assert state.model_state["statistics"]["mean"].dtype == jnp.float16
    assert 1 < float(state.model_state["statistics"]["mean"]) < 2.5


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_half_precision_parameters_stay_half(optimizer):
    start, state = _trained(HalfParameters, **{"optimizer.name": optimizer, "optimizer.ema_decay": 0.5})
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype(jnp.bfloat16)}
    assert start.network.logits(state.evaluation_variables, jnp.zeros((2, *SHAPE))).dtype == jnp.float32


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
    "cannot be trained": (
        lambda self, x, train=False: _layers(self, x, {"use_running_average": False} if train else None)
    ),
}


@pytest.mark.parametrize(("said", "call"), REFUSED.items())
def test_is_refused_before_a_run_begins(said, call):
    net = network.Network(_module(call, "Refused")(num_classes=tiny.CLASSES))
    with pytest.raises(UserError) as caught:
        preflight.check_network(net, SHAPE, tiny.CLASSES)
    assert str(caught.value).startswith(f"config.model {said}")
    assert "\n" not in str(caught.value)


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
