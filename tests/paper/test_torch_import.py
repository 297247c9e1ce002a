"""The network, the densities, the chain and the loss are those of the official PyTorch code, and so are its files.

Most tests compare with stored arrays (tests/data/README.md) and need no torch.
"""

import functools
import io
import pickle
import sys
import zipfile
from pathlib import Path

import compilation
import flax.linen as nn
import fuzzing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jem_jax import energy, objective, sgld, torch_import
from jem_jax.common.errors import UserError
from jem_jax.wide_resnet import NORMS, WideResNet

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "reference" / "official_checkpoint_wrn_10_1.pt"
REFERENCES = {"wrn_10_1": "none", "wrn_10_1_batch": "batch", "wrn_16_1_layer": "layer"}
WITH_TRAINING = ("wrn_10_1", "wrn_16_1_layer")


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def assert_close(actual, expected, tolerance):
    """Agreement relative to the largest entry, or to 1e-3 where there is nothing but rounding around 0."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


@functools.cache
def reference(name):
    with np.load(DATA / "reference" / f"official_{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def copy():
    with np.load(DATA / "torch_copy.npz") as arrays:
        return dict(arrays)


def section(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def official_state(name="wrn_10_1"):
    return section(reference(name), "state/")


# Some pre-activations in the official files lie within float32 rounding of a leaky ReLU's kink, where gradients jump by
# up to 2e-3: one of layer norm's is -2e-7 exactly, and +3e-7 in the official run. Raising these biases by a number far
# below what float32 resolves in the activations puts all of them on the side where the official run had them.
KINKS = {
    "wrn_10_1": {"train": {"f.layer1.0.conv1.bias": 1, "f.layer1.0.conv2.bias": 12, "f.layer3.0.conv2.bias": 23}},
    "wrn_16_1_layer": {"x": {"f.layer2.0.bn2.bias": 21}, "train": {"f.layer1.1.bn1.bias": 14}},
}


def nudged_state(name, inputs):
    """The official state for gradients at these inputs."""
    state = official_state(name)
    for key, channel in KINKS.get(name, {}).get(inputs, {}).items():
        state[key] = state[key].copy()
        state[key][channel] += 1e-6
    return state


@functools.cache
def imported(name, norm=None):
    state = official_state(name)
    if norm == "instance":  # the batch norm file's scales and biases do for it
        state = {key: value for key, value in state.items() if "running" not in key and "tracked" not in key}
    norm = norm or REFERENCES[name]
    return torch_import.model_from_state_dict(state, norm), torch_import.variables_from_state_dict(state, norm)


def in_float64(model, variables):
    """To be called, and the result used, where 64-bit types are enabled."""
    return model.clone(dtype=jnp.float64), jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)


# The official network in evaluation mode.


@functools.cache
def evaluation(name):
    """What the stored arrays of this file should be, in their own layout."""
    model = imported(name)[0]
    variables = torch_import.variables_from_state_dict(nudged_state(name, "x"), model.norm)

    @jax.jit
    def everything(x, y):
        def logits(x):
            return model.apply(variables, x)

        marginal, conditional = energy.marginal(logits), energy.conditional(logits, y)
        return {
            "logits": logits(x),
            "features": model.apply(variables, x, features=True),
            "log_px": marginal(x),
            "log_pxy": conditional(x),
            "grad_log_px": energy.score(marginal, x),
            "grad_log_pxy": energy.score(conditional, x),
        }

    results = everything(nhwc(reference(name)["x"]), reference(name)["y"])
    return {key: nchw(value) if value.ndim == 4 else value for key, value in results.items()}


@pytest.mark.parametrize("what", ["features", "logits", "log_px", "log_pxy", "grad_log_px", "grad_log_pxy"])
@pytest.mark.parametrize("name", REFERENCES)
def test_evaluation_agrees_with_the_official_network(name, what):
    assert_close(evaluation(name)[what], reference(name)[what], 1e-5)


# The official loss.


def jem_loss(model, variables, x_p, x_q, x_lab, y, **mode):
    """The loss, its terms, and the variables with whatever statistics the three batches left, in this order."""
    if "batch_stats" in variables:
        logits = []
        for x in (x_p, x_q, x_lab):
            out, updates = model.apply(variables, x, mutable=["batch_stats"], **mode)
            variables = {**variables, **updates}
            logits.append(out)
    else:  # in one pass, which compiles faster
        logits = jnp.split(model.apply(variables, jnp.concatenate([x_p, x_q, x_lab]), **mode), 3)
    parts = objective.Logits(data=logits[0], negatives=logits[1], labelled=logits[2])
    loss, terms = objective.joint_loss(parts, y, objective.Weights())
    return loss, (terms, variables)


@functools.cache
def gradients_of_loss(name):
    """(loss, terms, gradients under official names)."""
    model = imported(name)[0]
    near = torch_import.variables_from_state_dict(nudged_state(name, "train"), model.norm)
    train = section(reference(name), "train/")
    batches = [nhwc(train[key]) for key in ("x_p", "x_q", "x_lab")]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_gradients(params):
        loss, (terms, _) = jem_loss(model, {"params": params}, *batches, train["y_lab"])
        return loss, terms

    (loss, terms), gradients = loss_and_gradients(near["params"])
    return loss, terms, torch_import.state_dict_from_variables(model, {"params": gradients})


@pytest.mark.parametrize("name", WITH_TRAINING)
def test_loss_agrees_with_the_official_loss(name):
    train = section(reference(name), "train/")
    loss, terms, _ = gradients_of_loss(name)
    assert loss == pytest.approx(train["loss"], rel=1e-5)
    assert terms["cross_entropy"] == pytest.approx(train["loss_ce"], rel=1e-5)
    assert terms["log_px_data"] == pytest.approx(train["f_p"], rel=1e-5)
    assert terms["log_px_samples"] == pytest.approx(train["f_q"], rel=1e-5)
    contrast = terms["log_px_samples"] - terms["log_px_data"]
    assert contrast == pytest.approx(train["loss_px"], abs=1e-5 * abs(train["f_q"]))


@pytest.mark.parametrize("name", WITH_TRAINING)
def test_every_parameter_gradient_agrees_with_the_official_one(name):
    expected = section(reference(name), "train/grad/")
    gradients = gradients_of_loss(name)[2]
    unused = {"f.linear.weight", "f.linear.bias", "energy_output.weight", "energy_output.bias"}
    assert expected.keys() == gradients.keys() - unused
    for key, gradient in expected.items():
        assert_close(gradients[key], gradient, 1e-4)


# In float64, against the PyTorch copy: the same to rounding, chains of any length included.


@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [
        ("wrn_10_1", "chain", (5, 20)),
        ("wrn_10_1", "chain_clipped", (5,)),
        ("wrn_10_1", "chain_conditional", (5,)),
        ("wrn_10_1_batch", "chain", (5,)),
        ("wrn_16_1_layer", "chain", (5,)),
    ],
)
def test_float64_chains_are_those_of_pytorch(name, kind, steps):
    suffix = kind.removeprefix("chain")
    expected = [copy()[f"{name}/{REFERENCES[name]}/chain_{count}{suffix}"] for count in steps]
    images = len(expected[0])
    with jax.enable_x64(True):
        model, variables = in_float64(*imported(name))
        x = jnp.asarray(nhwc(reference(name)["x"][:images]), jnp.float64)
        y = reference(name)["y"][:images]
        logits = functools.partial(model.apply, variables)
        # Convolutions of float64 are plain loops on a CPU, which without optimisations take thirty times as long.
        states = jax.jit(
            functools.partial(
                sgld.trajectory,
                log_density=energy.conditional(logits, y) if suffix == "_conditional" else energy.marginal(logits),
                num_steps=steps[-1],
                every=5,
                step_size=1.0,
                noise_std=0.0,
                grad_clip=1.0 if suffix == "_clipped" else None,
                bounds=(-1.0, 1.0) if suffix == "_clipped" else None,
            ),
            compiler_options=compilation.as_users_do(),
        )(jax.random.key(0), x=x)
    for count, value in zip(steps, expected, strict=True):
        assert states.dtype == np.float64
        assert_close(nchw(states[count // 5]), value, 1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_stored_float64_chains_are_those_of_the_official_float32_code(name):
    for stored, official in (
        ("chain_5", "chain_5_steps_step_size_1_no_noise"),
        ("chain_5_clipped", "chain_5_steps_clipped_no_noise"),
    ):
        value = copy()[f"{name}/{REFERENCES[name]}/{stored}"]
        assert_close(value, reference(name)[official][: len(value)], 2e-3)


def training(name, norm):
    """The quantities of `reference_torch.training` under its names, by this package, in float64."""
    with jax.enable_x64(True):
        if norm == "act":
            # The file's own network has no norm; the layers start from the first batch, inside a given network.
            model = WideResNet(10, depth=10, width=1, norm="act", dtype=jnp.float64)
            _, variables = in_float64(model, imported(name)[1])
        else:
            model, variables = in_float64(*imported(name, norm))
        count = len(copy()[f"{name}/{norm}/logits"])
        x = jnp.asarray(nhwc(reference(name)["x"][:count]), jnp.float64)
        y = reference(name)["y"][:count]
        results = {}
        if norm == "act":
            start = jax.jit(lambda x: model.apply(variables, x, mutable=["params"], rngs={"params": jax.random.key(0)}))
            _, variables = start(x)

        @jax.jit
        def everything(variables):
            def loss(params):
                batches = (x, -x, x[:, :, ::-1])
                value, (_, after) = jem_loss(model, {**variables, "params": params}, *batches, y, train=True)
                return value, after

            (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            logits = functools.partial(model.apply, after)
            evaluated = {
                "logits": logits(x),
                "features": logits(x, features=True),
                "grad_log_px": energy.score(energy.marginal(logits), x).transpose(0, 3, 1, 2),
            }
            return value, after, gradients, evaluated

        loss, after, gradients, evaluated = everything(variables)
        results |= {"loss": loss, **evaluated}
        for prefix, tree in (("grad/", {**after, "params": gradients}), ("after/", after), ("start/", variables)):
            exported = in_official_names(model, tree)
            results |= {f"{prefix}{key}": value for key, value in exported.items()}
        return jax.tree.map(np.asarray, results)


def in_official_names(model, variables):
    """As `state_dict_from_variables`, which rounds to float32, does for names and layouts."""
    flat = traverse_util.flatten_dict(variables)
    return {
        name: torch_import._to_official(name, np.asarray(flat[path]))
        for name, (path, _) in torch_import._official_paths(model.clone(dtype=jnp.float32), 3).items()
        if path in flat
    }


@pytest.mark.parametrize(
    ("name", "norm", "parts"),
    [
        ("wrn_10_1_batch", "batch", {"after"}),
        ("wrn_10_1", "act", {"start"}),
        ("wrn_10_1_batch", "instance", set()),
    ],
    ids=["batch", "act", "instance"],
)
def test_training_mode_is_that_of_pytorch(name, norm, parts):
    """Gradients in training mode, the act norm's start, and batch norm's running statistics after three batches."""
    expected = section(copy(), f"{name}/{norm}/")
    expected = {key: value for key, value in expected.items() if not key.startswith("chain")}
    assert {key.split("/")[0] for key in expected} == {"loss", "grad", "logits", "features", "grad_log_px"} | parts
    results = training(name, norm)
    for key, value in expected.items():
        assert_close(results[key], value, 1e-10)


# What the names and shapes of a state dict tell.


def random_network(norm, *, depth=10, width=1, channels=3, num_classes=10):
    """A model, variables of it (from NumPy, since compiling their initialisation takes long), and images."""
    model = WideResNet(num_classes, depth=depth, width=width, norm=norm)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 8, 8, channels)).astype(np.float32)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    leaves = {path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    leaves = {path: 1 + leaf if path[-1] in ("scale", "var") else leaf for path, leaf in leaves.items()}
    return model, traverse_util.unflatten_dict(leaves), x


@pytest.mark.parametrize("norm", NORMS)
def test_any_network_survives_the_way_there_and_back(norm):
    model, variables, _ = random_network(norm, depth=16, width=2, channels=1, num_classes=7)
    state = torch_import.state_dict_from_variables(model, variables)
    given = norm if norm in ("layer", "instance") else None
    assert torch_import.model_from_state_dict(state, given) == model
    again = torch_import.variables_from_state_dict(state, given)
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))


@pytest.mark.parametrize("name", REFERENCES)
def test_export_gives_back_the_official_arrays_and_names(name):
    state = official_state(name)
    exported = torch_import.state_dict_from_variables(*imported(name))
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert exported[key].shape == value.shape
        assert exported[key].dtype == value.dtype
        if key.startswith(("f.linear", "energy_output")) or key.endswith("num_batches_tracked"):
            assert not exported[key].any()
        else:
            np.testing.assert_array_equal(exported[key], value)


def test_export_fills_the_unused_layers_as_the_official_code_shapes_them():
    model, variables, _ = random_network("act", num_classes=100)
    state = torch_import.state_dict_from_variables(model, variables)
    assert state["class_output.weight"].shape == (100, 64)
    assert state["f.linear.weight"].shape == (10, 64)  # whatever the number of classes
    assert state["f.bn1.loc"].shape == (1, 64, 1, 1)
    assert state["f.bn1.initialized"] == 1
    assert state["f.bn1.initialized"].dtype == np.uint8


def variant(kind, state):
    """The same weights as a successor's code would save them."""
    if kind.endswith("."):
        return {f"{kind}{key}": value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("f.linear")}
    if kind == "SADA-JEM":
        return state
    lists = {"f.layer1.": 0, "f.layer2.": 1, "f.layer3.": 2, "f.bn1.": 3}
    repeats = {}
    for key, value in state.items():
        if key.startswith("f.conv1."):
            repeats[key.replace("f.conv1", "f.layer_one")] = value
        for start, index in lists.items():
            if key.startswith(start):
                repeats[f"f.other_layers.{index}.{key.removeprefix(start)}"] = value
    return {**state, **repeats}


@pytest.mark.parametrize("kind", ["module.", "model._orig_mod.", "SADA-JEM", "JEM++"])
@pytest.mark.parametrize("name", REFERENCES)
def test_variants_of_the_state_dict_give_the_same_network(name, kind):
    model, variables = imported(name)
    state, norm = variant(kind, official_state(name)), REFERENCES[name]
    assert torch_import.model_from_state_dict(state, norm) == model
    jax.tree.map(np.testing.assert_array_equal, torch_import.variables_from_state_dict(state, norm), variables)


def test_other_precisions_and_integer_widths_are_accepted():
    state = {key: value.astype(np.float64) for key, value in official_state().items()}
    variables = torch_import.variables_from_state_dict(state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    jax.tree.map(np.testing.assert_array_equal, variables, imported("wrn_10_1")[1])


# What is wrong with a state dict or with variables: the error names the array.


def changed(name, change):
    """A state dict with one array changed, or left out where `change` is None."""
    return lambda state: {
        key: change(value.copy()) if key == name else value
        for key, value in state.items()
        if key != name or change is not None
    }


def added(name, *shape):
    return lambda state: {**state, name: np.zeros(shape)}


def spoilt(value):
    def spoil(array):
        array.flat[1] = value
        return array

    return spoil


BIAS, BATCH, LAYER = "f.layer2.0.conv1.bias", "wrn_10_1_batch", "wrn_16_1_layer"
BAD_STATES = [
    ("wrn_10_1", lambda _: {}, "f.conv1.weight"),
    ("wrn_10_1", lambda _: [1], "got a list"),
    ("wrn_10_1", lambda state: {**state, 3: state[BIAS]}, "unexpected 3"),
    *[("wrn_10_1", changed(name, None), f"missing {name}") for name in (
        "f.conv1.weight", "f.layer1.0.conv1.weight", BIAS, "f.layer3.0.shortcut.0.weight", "class_output.weight",
    )],
    ("wrn_10_1", added("f.layer4.0.conv1.bias", 128), "unexpected f.layer4.0.conv1.bias: a WRN-10-1"),
    ("wrn_10_1", added("f.layer3.1.conv1.bias", 64), "unexpected f.layer3.1.conv1.bias"),
    ("wrn_10_1", added("module.f.conv1.bias", 16), "unexpected module.f.conv1.bias"),
    ("wrn_10_1", changed("f.conv1.weight", lambda a: a[:, :, 0]), r"f.conv1.weight is \[16, 3, 3\]: expected \[16, ch"),
    ("wrn_10_1", changed("f.conv1.weight", lambda a: a[:, :, :1]), r"f.conv1.weight is \[16, 3, 1, 3\]: expected"),
    ("wrn_10_1", changed("f.layer1.0.conv1.weight", lambda a: a[:8]), r"is \[8, 16, 3, 3\]: expected \[16·width"),
    ("wrn_10_1", changed("class_output.weight", lambda a: a.T), "class_output.*expected"),
    ("wrn_10_1", changed(BIAS, lambda a: a[0]), rf"{BIAS} is \[\]: expected \[32\]"),
    ("wrn_10_1", changed(BIAS, spoilt(np.nan)), f"{BIAS}: 1 of 32 numbers are NaN or infinite"),
    ("wrn_10_1", changed(BIAS, lambda a: spoilt(1e300)(a.astype(np.float64))), f"{BIAS}: 1 of 32 numbers are NaN"),
    ("wrn_10_1", changed(BIAS, lambda a: a.astype(np.int32)), f"{BIAS} is of int32: expected float32"),
    ("wrn_10_1", changed(BIAS, lambda a: a.astype(str)), f"{BIAS} is of <U32: expected float32"),
    (BATCH, changed("f.bn1.running_mean", None), r"missing f.bn1.running_mean: expected an array \[64\]"),
    (BATCH, changed("f.bn1.running_var", spoilt(-1.0)), "f.bn1.running_var holds a negative number"),
    (BATCH, added("f.bn1.loc", 1, 64, 1, 1), "unexpected f.bn1.loc: a WRN-10-1 with norm batch"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_STATES)
def test_a_wrong_state_dict_is_refused(name, spoil, message):
    with pytest.raises(UserError, match=message) as error:
        torch_import.variables_from_state_dict(spoil(official_state(name)))
    assert "\n" not in str(error.value)


def test_an_act_norm_that_never_started_is_refused():
    model, variables, _ = random_network("act")
    state = torch_import.state_dict_from_variables(model, variables)
    state["f.layer2.0.bn2.initialized"] = np.zeros((), np.uint8)
    with pytest.raises(UserError, match=r"f\.layer2\.0\.bn2\.initialized is 0: expected 1"):
        torch_import.variables_from_state_dict(state)


@pytest.mark.parametrize(
    ("name", "norm", "message"),
    [
        ("wrn_10_1", "batch", "norm='batch' does not fit .* norm none"),
        (BATCH, "layer", "norm='layer' does not fit .* norm batch"),
        (LAYER, "act", "norm='act' does not fit .* norm layer"),
        (LAYER, "group", "norm must be one of none, batch, .*, not 'group'"),
        (LAYER, None, 'give norm="layer" or norm="instance"'),
    ],
)
def test_a_norm_that_does_not_fit_is_refused(name, norm, message):
    with pytest.raises(UserError, match=message):
        torch_import.variables_from_state_dict(official_state(name), norm)


def edited(variables, path, change):
    """The variables with one leaf replaced, or removed where `change` gives None."""
    leaves = {"/".join(key): leaf for key, leaf in traverse_util.flatten_dict(variables).items()}
    leaves[path] = change(leaves.get(path))
    return traverse_util.unflatten_dict({key: leaf for key, leaf in leaves.items() if leaf is not None}, sep="/")


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("params/classes/bias", lambda _: None, r"missing params/classes/bias: expected an array \[10\] in a WRN-10-1"),
        ("params/extra/bias", lambda _: np.zeros(3), "unexpected params/extra/bias: a WRN-10-1"),
        ("params/conv1/kernel", lambda a: a[None], r"conv1/kernel is \[1, 3, 3, 3, 16\]: expected \[3, 3, 3, 16\]"),
        ("params/conv1/bias", lambda a: a * np.nan, "params/conv1/bias: 16 of 16 numbers are NaN or infinite"),
        ("batch_stats/norm/norm/mean", lambda _: None, "missing batch_stats/norm/norm/mean"),
    ],
)
def test_wrong_variables_are_refused_on_export(path, change, message):
    model, variables = imported("wrn_10_1_batch")
    with pytest.raises(UserError, match=message):
        torch_import.state_dict_from_variables(model, edited(variables, path, change))


def test_only_a_wide_resnet_can_be_exported():
    with pytest.raises(UserError, match="no Dense: expected a WideResNet"):
        torch_import.state_dict_from_variables(nn.Dense(3), {"params": {}})


# The replay buffer.


def test_official_buffer_becomes_slots_and_classes():
    classes, slots = 3, 4
    official = np.arange(classes * slots * 2 * 5 * 6, dtype=np.float64).reshape(classes * slots, 2, 5, 6)
    buffer = torch_import.buffer_from_official(official, classes)
    assert buffer.shape == (slots, classes, 5, 6, 2)
    assert buffer.dtype == np.float32
    for label in range(classes):  # the official sampler finds class y from row y·N/classes on
        for slot in range(slots):
            np.testing.assert_array_equal(buffer[slot, label].transpose(2, 0, 1), official[label * slots + slot])
    np.testing.assert_array_equal(torch_import.buffer_to_official(buffer), official)
    plain = torch_import.buffer_from_official(official)
    assert plain.shape == (classes * slots, 1, 5, 6, 2)
    np.testing.assert_array_equal(torch_import.buffer_to_official(plain), official)


@pytest.mark.parametrize(
    ("array", "classes", "message"),
    [
        (np.zeros((4, 3, 8)), 1, r"replay_buffer is \[4, 3, 8\]: expected \[images, channels, H, W\]"),
        (np.zeros((0, 3, 8, 8)), 1, r"replay_buffer is \[0, 3, 8, 8\]: expected"),
        (np.zeros((10, 3, 8, 8)), 3, "replay_buffer holds 10 images: expected a multiple of the 3 classes"),
        (np.full((1, 1, 2, 2), np.nan), 1, "replay_buffer: 4 of 4 numbers are NaN or infinite"),
        (np.zeros((1, 1, 2, 2), np.uint8), 1, "replay_buffer is of uint8: expected float32"),
    ],
)
def test_wrong_buffer_is_named(array, classes, message):
    with pytest.raises(UserError, match=message):
        torch_import.buffer_from_official(array, classes)


# Files. Without torch they say what to install.


def test_missing_torch_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install "jem_jax\[torch\]"'):
        torch_import.read_checkpoint(CHECKPOINT)
    with pytest.raises(UserError, match=r'pip install "jem_jax\[torch\]"'):
        torch_import.write_checkpoint(tmp_path / "a.pt", official_state())


def test_old_torch_is_not_trusted_with_foreign_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    sys.modules["torch"].__version__ = "2.5.1"
    with pytest.raises(UserError, match=r"torch 2\.5\.1 does not read foreign files safely"):
        torch_import.read_checkpoint(CHECKPOINT)


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            torch_import.read_checkpoint(path)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def torch_copy(torch):
    torch.set_num_threads(1)  # more only get into the way of XLA's
    import reference_torch

    return reference_torch


@pytest.mark.torch
def test_official_checkpoint_is_read(torch):
    state, images = torch_import.read_checkpoint(CHECKPOINT)
    assert state.keys() == official_state().keys()
    for key, value in official_state().items():
        np.testing.assert_array_equal(state[key], value)
    assert images.shape == (20, 3, 32, 32)
    for class_conditional, shape in ((False, (20, 1, 32, 32, 3)), (True, (2, 10, 32, 32, 3))):
        model, variables, buffer = torch_import.load(CHECKPOINT, class_conditional=class_conditional)
        assert model == imported("wrn_10_1")[0]
        jax.tree.map(np.testing.assert_array_equal, variables, imported("wrn_10_1")[1])
        assert buffer.shape == shape
        np.testing.assert_array_equal(buffer[1, 0], images[1].transpose(1, 2, 0))


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_bare_state_dicts_of_either_format_are_read(torch, tmp_path, legacy):
    state = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in official_state().items()}
    path = tmp_path / "bare.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    read, images = torch_import.read_checkpoint(path)
    assert images is None
    assert torch_import.load(path).buffer is None
    for key, value in official_state().items():
        np.testing.assert_array_equal(read[key], value)


@pytest.mark.torch
@pytest.mark.parametrize("place", ["state_dict", "model", "net"])
def test_state_dicts_are_found_where_people_put_them(torch, tmp_path, place):
    state = {key: torch.tensor(value) for key, value in official_state().items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, place: state}, tmp_path / "x.pt")
    read, images = torch_import.read_checkpoint(tmp_path / "x.pt")
    assert images is None
    assert {*read} == {*official_state()}


@pytest.mark.torch
def test_half_precision_is_read_as_float32(torch, tmp_path):
    path = tmp_path / "half.pt"
    torch.save({"model_state_dict": {"a": torch.ones(2, dtype=torch.bfloat16)}, "replay_buffer": torch.zeros(0)}, path)
    state, images = torch_import.read_checkpoint(path)
    assert state["a"].dtype == np.float32
    assert images is None


@pytest.mark.torch
@pytest.mark.parametrize("with_buffer", [False, True])
def test_written_checkpoint_is_read_back(torch, tmp_path, with_buffer):
    state = torch_import.state_dict_from_variables(*imported("wrn_10_1_batch"))
    images = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32) if with_buffer else None
    path = tmp_path / "official.pt"
    path.write_bytes(b"an older file")
    torch_import.write_checkpoint(path, state, images)
    read, buffer = torch_import.read_checkpoint(path)
    assert read.keys() == state.keys()
    for key, value in state.items():
        assert read[key].dtype == value.dtype
        np.testing.assert_array_equal(read[key], value)
    np.testing.assert_array_equal(buffer, images)
    assert len(torch.load(path)["replay_buffer"]) == (6 if with_buffer else 0)
    assert [file.name for file in tmp_path.iterdir()] == ["official.pt"]


@pytest.mark.torch
def test_failed_write_leaves_the_older_file(torch, tmp_path, monkeypatch):
    path = tmp_path / "official.pt"
    path.write_bytes(b"an older file")

    def full_disk(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        torch_import.write_checkpoint(path, official_state())
    assert path.read_bytes() == b"an older file"
    assert [file.name for file in tmp_path.iterdir()] == ["official.pt"]


@pytest.mark.torch
@pytest.mark.parametrize(
    "how",
    ["torch.save", "torch.save before 1.6", "inside the buffer", "pickle 2", "pickle 3", "pickle 4", "pickle 5"],
)
def test_code_in_a_file_is_never_run(torch, tmp_path, how):
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt"
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model_state_dict": fuzzing.Trap(sprung)}, protocol=int(how[-1])))
    else:
        content = {"model_state_dict": {"f.conv1.bias": torch.zeros(16)}, "replay_buffer": fuzzing.Trap(sprung)}
        if how != "inside the buffer":
            content["model_state_dict"]["f.conv1.weight"] = fuzzing.Trap(sprung)
        torch.save(content, path, _use_new_zipfile_serialization="before" not in how)
    # torch does not read a newer pickle far enough to say what it holds.
    newer = how in ("pickle 4", "pickle 5")
    reason = "it is damaged or of another kind" if newer else r"it holds \w+\.open, and nothing but tensors"
    for read in (torch_import.read_checkpoint, torch_import.load):
        with pytest.raises(UserError, match=rf"trap\.pt is not a checkpoint of tensors.*: {reason}") as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not sprung.exists()
    if not how.startswith("pickle"):
        torch.load(path, weights_only=False)
        assert sprung.exists()  # the trap does work


@pytest.mark.torch
def test_changed_bytes_are_noticed(torch, tmp_path):
    path = tmp_path / "changed.pt"
    content = bytearray(CHECKPOINT.read_bytes())
    content[content.index(official_state()["f.layer2.0.conv2.weight"].tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"changed\.pt is not .*: \w+/data/\d+ does not have the checksum"):
        torch_import.read_checkpoint(path)
    # The list of parts: one that is none, and one that says it goes on in another file.
    whole = bytes(content)
    for start, change in ((b"PK\x01\x02", b"nope"), (b"PK\x06\x07", b"PK\x06\x07\x01")):
        path.write_bytes(change.join(whole.rsplit(start + bytes(len(change) - len(start)), 1)))
        with pytest.raises(UserError, match=r"changed\.pt is not a checkpoint .*: it is damaged"):
            torch_import.read_checkpoint(path)


def _zip():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.txt", "text")
    return packed.getvalue()


def _npz():
    packed = io.BytesIO()
    np.savez(packed, a=np.zeros(3))
    return packed.getvalue()


CONTENT = CHECKPOINT.read_bytes()
FOREIGN = [b"", b"not a checkpoint", b"\x80", b"PK\x03\x04 and nothing", _zip(), _npz(),
           *(CONTENT[: int(fraction * len(CONTENT))] for fraction in (0.0001, 0.01, 0.5, 0.999))]  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_or_truncated_file_is_refused(torch, tmp_path, content):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"foreign\.pt is not a checkpoint of tensors as torch.save writes it") as error:
        torch_import.read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not CONTENT.startswith(content or b"-") or "damaged" in str(error.value)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"model_state_dict": None}, "holds no state dict"),
        ({"model_state_dict": {"a": 3}}, "a is a int: expected a tensor"),
        ({"model_state_dict": {"a": "tensor"}, "replay_buffer": [1]}, "replay_buffer is a list: expected a tensor"),
        ({"model_state_dict": {"a": "sparse"}}, "a is not an ordinary tensor"),
        ({"model_state_dict": {"a": "tensor"}}, "missing f.conv1.weight"),
    ],
)
def test_other_contents_are_named(torch, tmp_path, content, message):
    path = tmp_path / "other.pt"
    tensors = {"tensor": torch.zeros(2), "sparse": torch.eye(2).to_sparse()}
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        weights = {key: tensors.get(value, value) for key, value in content["model_state_dict"].items()}
        content = {**content, "model_state_dict": weights}
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"other\.pt:? .*{message}") as error:
        torch_import.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.torch
def test_buffer_of_other_channels_is_named(torch, tmp_path):
    path = tmp_path / "grey.pt"
    torch_import.write_checkpoint(path, official_state(), np.zeros((4, 1, 32, 32), np.float32))
    with pytest.raises(UserError, match=r"replay_buffer is \[4, 1, 32, 32\]: expected \[N, 3, H, W\]"):
        torch_import.load(path)


# The PyTorch copy itself.


@pytest.mark.torch
@pytest.mark.parametrize("name", REFERENCES)
def test_the_copy_is_a_copy_of_the_official_network(torch_copy, name):
    _, x, y = torch_copy.official(name)
    state = nudged_state(name, "x")
    network = torch_copy.load(state, depth=16 if "16" in name else 10, norm=REFERENCES[name])
    assert list(network.state_dict()) == list(state)
    assert_close(network(x).detach().numpy(), reference(name)["logits"], 1e-5)
    assert_close(network.f(x).detach().numpy(), reference(name)["features"], 1e-5)
    assert_close(torch_copy.score(network, x).numpy(), reference(name)["grad_log_px"], 1e-5)
    assert_close(torch_copy.score(network, x, y).numpy(), reference(name)["grad_log_pxy"], 1e-5)


@pytest.mark.torch
def test_the_stored_arrays_are_those_the_copy_gives(torch_copy):
    arrays = torch_copy.arrays()
    assert arrays.keys() == copy().keys() - {"meta"}
    for key, value in arrays.items():
        assert_close(copy()[key], value, 1e-10)


@pytest.mark.torch
@pytest.mark.parametrize("norm", NORMS)
def test_exports_load_strictly_and_give_the_same_logits(torch, torch_copy, norm):
    model, variables, x = random_network(norm, width=2, num_classes=100)
    state = torch_import.state_dict_from_variables(model, variables)
    network = torch_copy.load(state, width=2, num_classes=100, norm=norm)
    assert state.keys() == network.state_dict().keys()
    logits = network(torch.tensor(nchw(x)).double()).detach().numpy()
    assert_close(jax.jit(model.apply)(variables, x), logits, 1e-5)
