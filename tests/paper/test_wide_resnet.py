"""The wide residual network: its shape, its starting weights and its norm layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jem_jax import wide_resnet
from jem_jax.config import Model
from jem_jax.training.network import Network, build, examples_a_pass, in_parts
from jem_jax.wide_resnet import WideResNet

KEY = jax.random.key(0)


def _shapes(network, *shape):
    return jax.eval_shape(network.init, KEY, jnp.zeros(shape))


def _count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _images(*shape):
    return jax.random.uniform(jax.random.key(1), shape, minval=-1.0, maxval=1.0)


@functools.cache
def _variables():
    """Variables of a WRN-10-1 for five classes."""
    return jax.jit(WideResNet(5, 10, 1).init)(KEY, _images(16, 8, 8, 3))


# Shape.


@pytest.mark.parametrize(
    ("depth", "width", "count"),
    [
        # Stem, then for each stage its blocks' 3×3 convolutions and 1×1 shortcut, then the classes; biases everywhere.
        (10, 1, 448 + (2320 + 2320) + (4640 + 9248 + 544) + (18496 + 36928 + 2112) + 650),
        (
            28,
            10,
            448
            + (23_200 + 7 * 230_560 + 2_720)
            + (461_120 + 7 * 921_920 + 51_520)
            + (1_843_840 + 7 * 3_687_040 + 205_440)
            + 6_410,
        ),
    ],
)
def test_the_number_of_parameters_is_the_sum_over_layers(depth, width, count):
    assert _count(_shapes(WideResNet(10, depth, width), 1, 32, 32, 3)) == count


def test_with_batch_norm_and_no_biases_it_has_the_published_number_of_parameters():
    # WRN-28-10 with batch norm has 36,479,194 parameters in the literature; the convolutions there have no biases.
    params = _shapes(WideResNet(10, 28, 10, norm="batch"), 1, 32, 32, 3)["params"]
    paths = jax.tree_util.tree_leaves_with_path(params)
    biases = [leaf for path, leaf in paths if path[-1].key == "bias" and path[-2].key in ("conv1", "conv2", "shortcut")]
    assert len(biases) == 1 + 2 * 12 + 3
    assert _count(params) - _count(biases) == 36_479_194


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (12, 20, 2), (4, 4, 3)])
def test_images_of_any_sides_that_halve_twice_give_logits_and_features(shape):
    network = WideResNet(7, depth=10, width=2)
    x = jnp.zeros((3, *shape))
    variables = jax.eval_shape(network.init, KEY, x)
    assert jax.eval_shape(network.apply, variables, x).shape == (3, 7)
    assert jax.eval_shape(lambda *args: network.apply(*args, features=True), variables, x).shape == (3, 128)


def test_the_stride_sits_on_the_second_convolution_of_the_later_stages():
    network = WideResNet(10, depth=10, width=1)
    x = jnp.zeros((2, 12, 20, 3))
    variables = jax.eval_shape(network.init, KEY, x)
    _, state = jax.eval_shape(lambda *args: network.apply(*args, capture_intermediates=True), variables, x)
    sides = {
        (block, conv): outputs[conv]["__call__"][0].shape[1:3]
        for block, outputs in state["intermediates"].items()
        if block.startswith("stage")
        for conv in ("conv1", "conv2")
    }
    assert sides == {
        ("stage1_block0", "conv1"): (12, 20),
        ("stage1_block0", "conv2"): (12, 20),
        ("stage2_block0", "conv1"): (12, 20),
        ("stage2_block0", "conv2"): (6, 10),
        ("stage3_block0", "conv1"): (6, 10),
        ("stage3_block0", "conv2"): (3, 5),
    }


@pytest.mark.parametrize("depth", [4, 9, 11, 27, 30])
def test_a_depth_that_no_number_of_blocks_gives_is_an_error(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 4 .*not {depth}"):
        _shapes(WideResNet(10, depth, 1), 1, 8, 8, 3)


@pytest.mark.parametrize("shape", [(1, 30, 32, 3), (1, 32, 30, 3), (1, 2, 4, 3), (1, 0, 4, 3), (8, 8, 3)])
def test_sides_that_do_not_halve_twice_are_an_error(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        _shapes(WideResNet(10, 10, 1), *shape)


def test_an_unknown_norm_is_an_error():
    with pytest.raises(ValueError, match="norm must be one of none, batch, instance, layer, act, not 'group'"):
        _shapes(WideResNet(10, 10, 1, norm="group"), 1, 8, 8, 3)


# Starting weights.


def test_weights_and_biases_start_uniform_within_one_over_the_root_of_the_fan_in():
    params = _variables()["params"]
    layers = {"conv1": params["conv1"], "classes": params["classes"]}
    layers |= {
        f"{block}/{name}": layer for block in params if "block" in block for name, layer in params[block].items()
    }
    assert len(layers) == 2 + 3 * 2 + 2
    biases = []
    for name, layer in layers.items():
        bound = 1 / math.sqrt(math.prod(layer["kernel"].shape[:-1]))
        kernel, bias = (np.asarray(layer[part]).ravel() / bound for part in ("kernel", "bias"))
        assert np.abs(kernel).max() <= 1, name
        assert np.abs(bias).max() <= 1, name
        assert stats.kstest(kernel, stats.uniform(-1, 2).cdf).pvalue > 1e-4, name
        biases.append(bias)
    assert stats.kstest(np.concatenate(biases), stats.uniform(-1, 2).cdf).pvalue > 1e-4


# Precision.


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


@pytest.mark.parametrize("norm", ["batch", "instance", "layer", "act"])
def test_a_norm_of_bfloat16_images_rounds_its_output_only(norm):
    x = (5 + 0.5 * jax.random.normal(KEY, (4, 8, 8, 3))).astype(jnp.bfloat16)
    layer = wide_resnet.Norm(norm)
    variables = layer.init(KEY, x, True)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    half, full = (layer.apply(variables, x.astype(dtype), True) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), full, rtol=2**-8, atol=2e-3)


# Norm layers.


def test_batch_norm_trains_on_the_batch_and_keeps_unbiased_running_statistics():
    x = 3 + 2 * jax.random.normal(KEY, (5, 4, 3, 2))
    values = np.asarray(x, np.float64)
    mean, variance = values.mean((0, 1, 2)), values.var((0, 1, 2))
    params = {"scale": jnp.array([2.0, 0.5]), "bias": jnp.array([1.0, -1.0])}
    before = {"mean": np.array([10.0, -10.0]), "var": np.array([4.0, 9.0])}
    layer = wide_resnet.BatchNorm()
    y, state = layer.apply({"params": params, "batch_stats": before}, x, True, mutable=["batch_stats"])
    expected = (values - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    # The new batch weighs 0.9.
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * before["mean"] + 0.9 * mean, rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["var"], 0.1 * before["var"] + 0.9 * variance * 60 / 59, rtol=1e-5)


def test_starting_batch_norm_leaves_its_running_statistics_at_zero_and_one():
    variables = wide_resnet.BatchNorm().init(KEY, 3 + jax.random.normal(KEY, (5, 2)), True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])
    np.testing.assert_array_equal(variables["batch_stats"]["var"], [1, 1])


def test_batch_norm_trains_the_same_with_its_statistics_frozen():
    layer, x = wide_resnet.BatchNorm(), 3 + jax.random.normal(KEY, (5, 2))
    variables = layer.init(KEY, x, True)
    mutable, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(layer.apply(variables, x, True), mutable)


def test_act_norm_keeps_its_first_statistics():
    layer, first = wide_resnet.ActNorm(), 3 + 2 * jax.random.normal(KEY, (50, 4))
    variables = layer.init(KEY, first)
    loc, scale = variables["params"]["loc"], variables["params"]["scale"]
    np.testing.assert_allclose(loc, -np.mean(first, axis=0), rtol=1e-5)
    np.testing.assert_allclose(scale, 1 / (np.std(first, axis=0, ddof=1) + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(layer.apply(variables, first + 1), scale * (first + 1 + loc), rtol=1e-5, atol=1e-6)


def _normalised(x, axes):
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "tolerance"),
    # With a small std the result tells an epsilon of 1e-5 from Flax's 1e-6.
    [(0.5, 1.0, 1e-5), (0.0, 3e-3, 1e-5), (30.0, 0.1, 1e-3)],
    ids=["plain", "flat", "off centre"],
)
@pytest.mark.parametrize(("norm", "axes"), [("instance", (1, 2)), ("layer", (1, 2, 3))])
def test_instance_and_layer_norm_follow_their_formula(norm, axes, mean, std, tolerance):
    x = mean + std * jax.random.normal(KEY, (3, 4, 6, 5))
    layer = wide_resnet.Norm(norm)
    variables = layer.init(KEY, x, False)
    np.testing.assert_allclose(layer.apply(variables, x, False), _normalised(x, axes), rtol=tolerance, atol=tolerance)
    scale, bias = jnp.arange(1.0, 6.0), jnp.arange(5.0)
    assert jax.tree.map(jnp.shape, variables["params"]["norm"]) == {"scale": (5,), "bias": (5,)}
    y = layer.apply({"params": {"norm": {"scale": scale, "bias": bias}}}, x, True)
    np.testing.assert_allclose(y, _normalised(x, axes) * scale + bias, rtol=tolerance, atol=8 * tolerance)


def test_no_norm_is_the_identity():
    x = _images(2, 4, 4, 3)
    layer = wide_resnet.Norm("none")
    assert layer.init(KEY, x, True) == {}
    np.testing.assert_array_equal(layer.apply({}, x, True), x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("leaky_relu", lambda x: np.where(x > 0, x, 0.2 * x)),
        ("swish", lambda x: x / (1 + np.exp(-x))),
        ("softplus", lambda x: np.log1p(np.exp(x))),
    ],
)
def test_activations_are_their_formulas(kind, expected):
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(wide_resnet._activate(kind, x), expected(x), rtol=1e-5, atol=1e-6)


def test_a_network_is_what_its_settings_say():
    settings = {"depth": 16, "width": 2, "norm": "batch", "dropout": 0.3, "activation": "swish"}
    expected = WideResNet(num_classes=7, dtype=jnp.dtype("bfloat16"), **settings)
    assert build(Model(dtype="bfloat16", **settings), 7).module == expected


# Dropout.


def test_dropout_acts_while_training_only():
    network, variables, x = WideResNet(5, 10, 1, dropout=0.5), _variables(), _images(2, 8, 8, 3)

    @jax.jit
    def run(variables, x, key):
        train = network.apply(variables, x, train=True, rngs={"dropout": key})
        return train, network.apply(variables, x), WideResNet(5, 10, 1).apply(variables, x, train=True)

    first, evaluated, without = run(variables, x, jax.random.key(1))
    np.testing.assert_allclose(evaluated, without, rtol=1e-6)
    assert jnp.all(jnp.abs(first - evaluated) > 1e-5)
    assert jnp.all(first != run(variables, x, jax.random.key(2))[0])
    np.testing.assert_array_equal(first, run(variables, x, jax.random.key(1))[0])


@pytest.mark.parametrize(
    ("batch", "side", "expected"),
    [(32, 8, 32), (256, 8, 128), (32, 32, 8), (20, 32, 5), (14, 32, 7), (34, 32, 34), (4, 32, 4), (8, 512, 1)],
)
def test_on_a_cpu_a_batch_passes_in_parts_that_fit_the_cache(batch, side, expected, monkeypatch):
    assert examples_a_pass(batch, (side, side, 3)) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert examples_a_pass(batch, (side, side, 3)) == batch


def test_in_parts_a_function_sees_a_part_of_every_array(monkeypatch):
    monkeypatch.setattr("jem_jax.training.network._CPU_PIXELS", 2 * 8 * 8)
    x, y = jnp.arange(6.0 * 64).reshape(6, 8, 8, 1), jnp.arange(6)
    sizes = []

    def function(part):
        x, none, y = part
        assert none is None
        sizes.append(len(x))
        return x.sum(axis=(1, 2)) + y[:, None]

    found = in_parts(function, (x, None, y), x.shape)
    assert set(sizes) == {2}
    np.testing.assert_array_equal(found, x.sum(axis=(1, 2)) + y[:, None])


def test_a_batch_in_parts_has_the_logits_of_the_whole(monkeypatch):
    net = Network(WideResNet(num_classes=3, depth=10, width=1))
    batches = [np.random.default_rng(i).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32) for i in range(2)]
    variables = net.init(jax.random.key(0), batches[0])
    whole, _ = net.train_logits(variables, batches, jax.random.key(1))
    monkeypatch.setattr("jem_jax.training.network._CPU_PIXELS", 2 * 8 * 8)
    traced = []
    monkeypatch.setattr(net, "train_pass", lambda *args: traced.append(len(args[1])) or Network.train_pass(net, *args))
    parts, _ = net.train_logits(variables, batches, jax.random.key(1))
    assert traced == [2], "parts of two images, whose pass is traced once"
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_batches_in_one_pass_have_the_logits_of_a_pass_each(monkeypatch):
    net = Network(WideResNet(num_classes=3, depth=10, width=1))
    batches = [np.random.default_rng(i).uniform(-1, 1, (2 + i, 8, 8, 1)).astype(np.float32) for i in range(3)]
    variables = net.init(jax.random.key(0), batches[0])
    alone, _ = net.train_logits(variables, batches, jax.random.key(1))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    passes = []
    monkeypatch.setattr(net, "train_pass", lambda *args: passes.append(args) or Network.train_pass(net, *args))
    together, state = net.train_logits(variables, batches, jax.random.key(1))
    assert (len(passes), state) == (1, {})
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
