"""The wide residual network: its shape, its starting weights and its norm layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from scipy import stats

from jem_jax import wide_resnet
from jem_jax.config import Model
from jem_jax.training.network import Network, build, examples_a_pass
from jem_jax.wide_resnet import WideResNet

KEY = jax.random.key(0)


def _shapes(network, *shape):
    return jax.eval_shape(network.init, KEY, jnp.zeros(shape))


def _count(leaves):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves))


def _images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def _normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@functools.cache
def _variables():
    """Variables of a WRN-10-1 for five classes."""
    return jax.jit(WideResNet(5, 10, 1).init)(KEY, _images(16, 8, 8, 3))


def test_with_batch_norm_and_no_biases_it_has_the_published_number_of_parameters():
    # WRN-28-10 with batch norm has 36,479,194 parameters in the literature; the convolutions there have no biases.
    params = _shapes(WideResNet(10, 28, 10, norm="batch"), 1, 32, 32, 3)["params"]
    paths = jax.tree_util.tree_leaves_with_path(params)
    biases = [leaf for path, leaf in paths if path[-1].key == "bias" and path[-2].key in ("conv1", "conv2", "shortcut")]
    assert len(biases) == 1 + 2 * 12 + 3
    assert _count(params) - _count(biases) == 36_479_194


def test_images_of_any_sides_that_halve_twice_give_logits_and_features():
    network, x = WideResNet(7, depth=10, width=2), jnp.zeros((3, 4, 20, 2))
    variables = _shapes(network, *x.shape)
    assert jax.eval_shape(network.apply, variables, x).shape == (3, 7)
    assert jax.eval_shape(lambda *args: network.apply(*args, features=True), variables, x).shape == (3, 128)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        *[({"depth": depth}, (1, 8, 8, 3), rf"depth must be 6n \+ 4 .*not {depth}") for depth in (4, 11)],
        *[({}, shape, "multiples of 4") for shape in ((1, 32, 30, 3), (1, 0, 4, 3), (8, 8, 3))],
        ({"norm": "group"}, (1, 8, 8, 3), "norm must be one of none, batch, instance, layer, act, not 'group'"),
    ],
)
def test_a_network_that_cannot_be_is_an_error(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        _shapes(WideResNet(10, **{"depth": 10, "width": 1, **settings}), *shape)


def test_weights_and_biases_start_uniform_within_one_over_the_root_of_the_fan_in():
    params = traverse_util.flatten_dict(_variables()["params"], sep="/")
    layers = [path.removesuffix("kernel") for path in params if path.endswith("kernel")]
    assert len(layers) == 2 + 3 * 2 + 2
    values = {"kernel": [], "bias": []}
    for layer in layers:
        bound = 1 / math.sqrt(math.prod(params[f"{layer}kernel"].shape[:-1]))
        for part in values:
            values[part].append(np.asarray(params[layer + part]).ravel() / bound)
            assert np.abs(values[part][-1]).max() <= 1, layer
        assert np.abs(values["kernel"][-1]).max() > 0.95, layer
    for every in values.values():
        assert stats.kstest(np.concatenate(every), stats.uniform(-1, 2).cdf, method="asymp").pvalue > 1e-4


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    x, variables = _images(2, 8, 8, 3), _variables()
    full, half = (WideResNet(5, 10, 1, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(_shapes(half, 1, 8, 8, 3))} == {jnp.dtype("float32")}
    logits, state = jax.jit(lambda v, x: half.apply(v, x, capture_intermediates=True))(variables, x)
    assert logits.dtype == jnp.float32
    for layer in ("conv1", "stage1_block0", "stage3_block0"):
        assert state["intermediates"][layer]["__call__"][0].dtype == jnp.bfloat16
    exact = jax.jit(full.apply)(variables, x)
    np.testing.assert_allclose(logits, exact, atol=0.05)
    assert not np.allclose(logits, exact, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "layer", "act"])
def test_a_norm_of_bfloat16_images_rounds_its_output_only(norm):
    x, layer = jnp.asarray(5 + 0.5 * _normal(4, 8, 8, 3), jnp.bfloat16), wide_resnet.Norm(norm)

    @jax.jit
    def run(x):
        variables = layer.init(KEY, x, True)
        return variables, layer.apply(variables, x, True), layer.apply(variables, x.astype(jnp.float32), True)

    variables, half, full = run(x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), full, rtol=2**-8, atol=2e-3)


def test_batch_norm_starts_plain_and_keeps_its_statistics_where_they_may_not_change():
    x = 3 + 2 * _normal(5, 4, 3, 2)

    @jax.jit
    def run(x):
        layer = wide_resnet.BatchNorm()
        variables = layer.init(KEY, x, True)
        y, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
        return variables["batch_stats"], y, layer.apply(variables, x, True)

    start, y, frozen = run(x)
    assert {name: list(value) for name, value in start.items()} == {"mean": [0, 0], "var": [1, 1]}
    np.testing.assert_array_equal(frozen, y)


@pytest.mark.parametrize(("norm", "axes"), [("instance", (1, 2)), ("layer", (1, 2, 3))])
def test_instance_and_layer_norm_follow_their_formula(norm, axes):
    layer, scale, bias = wide_resnet.Norm(norm), np.arange(1.0, 6.0), np.arange(5.0)

    @jax.jit
    def run(x):
        other = {"params": {"norm": {"scale": scale, "bias": bias}}}
        return layer.init_with_output(KEY, x, False), layer.apply(other, x, True)

    # With a small std the result tells an epsilon of 1e-5 from Flax's 1e-6.
    for mean, std, tolerance in ((0.5, 1.0, 1e-5), (0.0, 3e-3, 1e-5), (30.0, 0.1, 1e-3)):
        x = (mean + std * _normal(3, 4, 6, 5)).astype(np.float32)
        (plain, variables), scaled = run(x)
        values = x.astype(np.float64)
        expected = values - values.mean(axes, keepdims=True)
        expected /= np.sqrt(values.var(axes, keepdims=True) + 1e-5)
        assert jax.tree.map(jnp.shape, variables["params"]["norm"]) == {"scale": (5,), "bias": (5,)}
        np.testing.assert_allclose(plain, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(scaled, expected * scale + bias, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("swish", lambda x: x / (1 + np.exp(-x))), ("softplus", lambda x: np.log1p(np.exp(x)))],
)
def test_activations_are_their_formulas(kind, expected):
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(wide_resnet._activate(kind, x), expected(x), rtol=1e-5, atol=1e-6)


def test_a_network_is_what_its_settings_say():
    settings = {"depth": 16, "width": 2, "norm": "batch", "dropout": 0.3, "activation": "swish"}
    expected = WideResNet(num_classes=7, dtype=jnp.dtype("bfloat16"), **settings)
    assert build(Model(dtype="bfloat16", **settings), 7).module == expected


def test_dropout_acts_while_training_only():
    network, variables, x = WideResNet(5, 10, 1, dropout=0.5), _variables(), _images(2, 8, 8, 3)

    @jax.jit
    def run(variables, x, key):
        train = network.apply(variables, x, train=True, rngs={"dropout": key})
        return train, network.apply(variables, x), WideResNet(5, 10, 1).apply(variables, x, train=True)

    first, evaluated, without = map(np.asarray, run(variables, x, jax.random.key(1)))
    np.testing.assert_allclose(evaluated, without, rtol=1e-6)
    assert np.all(np.abs(first - evaluated) > 1e-5)
    assert np.all(first != run(variables, x, jax.random.key(2))[0])
    np.testing.assert_array_equal(first, run(variables, x, jax.random.key(1))[0])


@pytest.mark.parametrize(("batch", "side", "expected"), [(32, 8, 32), (20, 32, 5), (34, 32, 34), (8, 512, 1)])
def test_on_a_cpu_a_batch_passes_in_parts_that_fit_the_cache(batch, side, expected, monkeypatch):
    assert examples_a_pass(batch, (side, side, 3)) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert examples_a_pass(batch, (side, side, 3)) == batch


def test_batches_in_parts_or_in_one_pass_have_the_logits_of_a_pass_each(monkeypatch):
    net = Network(tiny.mlp(3))
    batches = [_images(size, 8, 8, 1) for size in (4, 2, 4)]
    variables = jax.jit(net.init)(KEY, batches[0])
    traced = []
    run = lambda: jax.jit(lambda: net.train_logits(variables, batches, KEY))()  # noqa: E731
    monkeypatch.setattr(net, "train_pass", lambda *args: traced.append(len(args[1])) or Network.train_pass(net, *args))
    together, state = run()
    assert (traced, state) == ([10], {}), "a cache holds all of them"
    monkeypatch.setattr("jem_jax.training.network._CPU_PIXELS", 2 * 8 * 8)
    whole, _ = run()
    assert traced[1:] == [2], "a pass of a shape is traced once"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run()
    assert traced[2:] == [10]
    for one, other in zip(whole, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
