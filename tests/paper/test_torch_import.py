"""The network, the densities, the chain and the loss are those of the official PyTorch code, and so are its files.

Most tests compare with stored arrays (tests/data/README.md) and need no torch.
"""

import functools
import pickle
import sys
import types
from pathlib import Path

import flax.linen as nn
import fuzzing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from jem_jax import energy, objective, sgld, torch_import
from jem_jax.common.errors import UserError
from jem_jax.wide_resnet import NORMS, WideResNet

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "reference" / "official_checkpoint_wrn_10_1.pt"
COPY, BATCH, LAYER = "torch_copy.npz", "wrn_10_1_batch", "wrn_16_1_layer"
REFERENCES = {"wrn_10_1": "none", BATCH: "batch", LAYER: "layer"}
IMAGES, SMALL = 2, 1000
"""images of the copy's arrays, and entries of its largest parameter gradient"""


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def assert_close(actual, expected, tolerance, name=""):
    """Agreement relative to the largest entry, or to 1e-3 where there is nothing but rounding around 0."""
    limit = tolerance * max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, err_msg=name)


@functools.cache
def stored(path):
    with np.load(DATA / path) as arrays:
        return dict(arrays)


def reference(name):
    return stored(f"reference/official_{name}.npz")


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
def imported(name):
    state, norm = official_state(name), REFERENCES[name]
    return torch_import.model_from_state_dict(state, norm), torch_import.variables_from_state_dict(state, norm)


def in_float64(model, variables):
    """To be called, and the result used, where 64-bit types are enabled."""
    return model.clone(dtype=jnp.float64), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)


@pytest.mark.parametrize("name", REFERENCES)
def test_evaluation_agrees_with_the_official_network(name):
    model, expected = imported(name)[0], reference(name)
    count = len(expected["x"])

    @jax.jit
    def run(variables, x, y):
        logits = jax.jit(functools.partial(model.apply, variables))  # traced once for all of these

        def densities(twice):
            """log p~(x) of the first half and log p~(x, y) of the second: one gradient compiles in half the time."""
            found = logits(twice)
            return jnp.concatenate([energy.log_density(found[:count]), energy.joint_log_density(found[count:], y)])

        twice = jnp.concatenate([x, x])
        scores = energy.score(densities, twice).transpose(0, 3, 1, 2)
        return logits(x), model.apply(variables, x, features=True), densities(twice), scores

    variables = torch_import.variables_from_state_dict(nudged_state(name, "x"), model.norm)
    logits, features, densities, scores = run(variables, nhwc(expected["x"]), expected["y"])
    found = {"logits": logits, "features": features, "log_px": densities[:count], "log_pxy": densities[count:]}
    for key, value in {**found, "grad_log_px": scores[:count], "grad_log_pxy": scores[count:]}.items():
        assert_close(value, expected[key], 1e-5, key)


def jem_loss(model, variables, x_p, x_q, x_lab, y):
    """The loss in training mode, its terms, and the variables with the statistics that the batches left in turn."""
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    if "batch_stats" in variables:
        logits = []
        for x in (x_p, x_q, x_lab):
            out, stats = apply(variables, x)
            variables = {**variables, **stats}
            logits.append(out)
    else:  # in one pass, which compiles faster
        logits = jnp.split(apply(variables, jnp.concatenate([x_p, x_q, x_lab]))[0], 3)
    parts = objective.Logits(data=logits[0], negatives=logits[1], labelled=logits[2])
    loss, terms = objective.joint_loss(parts, y, objective.Weights())
    return loss, (terms, variables)


@pytest.mark.parametrize("name", ["wrn_10_1", LAYER])
def test_the_loss_and_every_parameter_gradient_agree_with_the_official_ones(name):
    model = imported(name)[0]
    params = torch_import.variables_from_state_dict(nudged_state(name, "train"), model.norm)["params"]
    train = section(reference(name), "train/")
    batches = [nhwc(train[key]) for key in ("x_p", "x_q", "x_lab")]
    loss_fn = lambda params: jem_loss(model, {"params": params}, *batches, train["y_lab"])  # noqa: E731
    (_, (terms, _)), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    names = {"loss": "loss", "loss_ce": "cross_entropy", "f_p": "log_px_data", "f_q": "log_px_samples"}
    for key, term in names.items():
        assert terms[term] == pytest.approx(train[key], rel=1e-5), key
    contrast = terms["log_px_samples"] - terms["log_px_data"]
    assert contrast == pytest.approx(train["loss_px"], abs=1e-5 * abs(train["f_q"]))
    found = torch_import.state_dict_from_variables(model, {"params": gradients})
    expected = section(train, "grad/")
    unused = {"f.linear.weight", "f.linear.bias", "energy_output.weight", "energy_output.bias"}
    assert expected.keys() == found.keys() - unused
    for key, gradient in expected.items():
        assert_close(found[key], gradient, 1e-4, key)


# In float64, against the PyTorch copy: the same to rounding, chains of any length included.


def test_chains_are_those_of_pytorch():
    x = nhwc(reference("wrn_10_1")["x"][:IMAGES])
    with jax.enable_x64(True):
        model, variables = in_float64(*imported("wrn_10_1"))

        # Convolutions of float64 are plain loops on a CPU, which without optimisations take thirty times as long.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
        def states(variables, x, limit):
            """Of 20 steps of size 1 without noise, every fifth; `limit` bounds gradients and x."""
            density = energy.marginal(functools.partial(model.apply, variables))
            how = {"num_steps": 20, "every": 5, "step_size": 1.0, "noise_std": 0.0}
            return sgld.trajectory(jax.random.key(0), density, x, grad_clip=limit, bounds=(-limit, limit), **how)

        free, clipped = (np.asarray(states(variables, x.astype(np.float64), limit)) for limit in (np.inf, 1.0))
    assert free.dtype == np.float64
    for name, state in (("chain_5", free[1]), ("chain_20", free[4]), ("chain_5_clipped", clipped[1])):
        assert_close(nchw(state), stored(COPY)[f"wrn_10_1/none/{name}"], 1e-12, name)
    for kind, state in (("step_size_1", free[1]), ("clipped", clipped[1])):
        assert_close(nchw(state), reference("wrn_10_1")[f"chain_5_steps_{kind}_no_noise"][:IMAGES], 2e-3, kind)


def in_official_names(model, tree):
    """As `state_dict_from_variables`, which rounds to float32, does for names and layouts."""
    paths = torch_import._official_paths(model.clone(dtype=jnp.float32), 3)
    flat = traverse_util.flatten_dict(tree)
    return {
        name: torch_import._to_official(name, np.asarray(flat[path]))
        for name, (path, _) in paths.items()
        if path in flat
    }


def assert_those_of_pytorch(where, found):
    """The stored arrays of one norm, of which there are some."""
    expected = section(stored(COPY), where)
    assert len(expected) > 10
    for key, value in expected.items():
        assert_close(found[key.split("/")[-1]], value, 1e-10, key)


def three_batches(name):
    x = nhwc(reference(name)["x"][:IMAGES, :, ::2, ::2]).astype(np.float64)
    return x, -x, x[:, :, ::-1], reference(name)["y"][:IMAGES]


def test_batch_norm_trains_as_in_pytorch():
    """Loss, small gradients, and running statistics after three batches."""
    with jax.enable_x64(True):
        model, variables = in_float64(*imported(BATCH))
        batches = three_batches(BATCH)

        @jax.jit
        def train(variables):
            loss_fn = lambda params: jem_loss(model, {**variables, "params": params}, *batches)  # noqa: E731
            (loss, (_, after)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
            flat = traverse_util.flatten_dict({**after, "params": gradients})
            return loss, traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if leaf.size <= SMALL})

        loss, results = train(variables)
    assert_those_of_pytorch("wrn_10_1_batch/batch/", {"loss": loss, **in_official_names(model, results)})


def test_act_norm_starts_as_in_pytorch():
    """Its layers start from the first batch, each behind those that have started; then the loss of three batches."""
    with jax.enable_x64(True):
        model, variables = in_float64(*imported("wrn_10_1"))
        model = model.clone(norm="act")
        batches = three_batches("wrn_10_1")

        @jax.jit
        def start(variables):
            rngs = {"params": jax.random.key(0)}
            _, variables = model.apply(variables, batches[0], mutable=["params"], rngs=rngs)
            return jem_loss(model, variables, *batches)[0], variables

        loss, variables = start(variables)
    assert_those_of_pytorch("wrn_10_1/act/", {"loss": loss, **in_official_names(model, variables)})


def random_network(norm, *, width=1, channels=3, num_classes=10):
    """A model, variables of it (from NumPy, since compiling their initialisation takes long), and images."""
    model = WideResNet(num_classes, depth=10, width=width, norm=norm)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 8, 8, channels)).astype(np.float32)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    leaves = {path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    leaves = {path: 1 + leaf if path[-1] in ("scale", "var") else leaf for path, leaf in leaves.items()}
    return model, traverse_util.unflatten_dict(leaves), x


@pytest.mark.parametrize(("norm", "given"), [("act", None), ("instance", "instance")])
def test_any_network_survives_the_way_there_and_back(norm, given):
    model, variables, _ = random_network(norm, width=2, channels=1, num_classes=7)
    state = torch_import.state_dict_from_variables(model, variables)
    assert torch_import.model_from_state_dict(state, given) == model
    assert not tiny.differing(torch_import.variables_from_state_dict(state, given), variables)
    assert state["f.linear.weight"].shape == (10, 128)  # whatever the number of classes
    if norm == "act":
        assert (state["f.bn1.initialized"], state["f.bn1.initialized"].dtype) == (1, np.uint8)
        assert state["f.bn1.loc"].shape == (1, 128, 1, 1)
        state["f.layer2.0.bn2.initialized"] = np.zeros((), np.uint8)
        with pytest.raises(UserError, match=r"f\.layer2\.0\.bn2\.initialized is 0: expected 1"):
            torch_import.variables_from_state_dict(state)


@pytest.mark.parametrize("name", REFERENCES)
def test_export_gives_back_the_official_arrays_and_names(name):
    exported = torch_import.state_dict_from_variables(*imported(name))
    unread = ("f.linear", "energy_output")
    zeros = {key for key in exported if key.startswith(unread) or key.endswith("num_batches_tracked")}
    state = {key: np.zeros_like(value) if key in zeros else value for key, value in official_state(name).items()}
    assert not tiny.differing(exported, state)


def variant(kind, state):
    """The same weights as a successor's code, or another precision, would save them."""
    if kind.endswith("."):
        return {f"{kind}{key}": value for key, value in state.items()}
    if kind == "float64":
        return {key: value.astype(np.float64) for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("f.linear")}
    repeats = {"f.conv1.weight": "f.layer_one.weight", "f.bn1.bias": "f.other_layers.3.bias"} if kind == "JEM++" else {}
    return {**state, **{repeat: state[name] for name, repeat in repeats.items()}}


@pytest.mark.parametrize("kind", ["module.", "model._orig_mod.", "SADA-JEM", "JEM++", "float64"])
def test_variants_of_the_state_dict_give_the_same_network(kind):
    model, variables = imported(BATCH)
    state = variant(kind, official_state(BATCH))
    assert torch_import.model_from_state_dict(state) == model
    assert not tiny.differing(torch_import.variables_from_state_dict(state), variables)


def replaced(arrays, name, array):
    """The arrays with one of them replaced, or left out where there is none instead."""
    return {key: value for key, value in {**arrays, name: array}.items() if value is not None}


STEM, BLOCK, BIAS, CLASSES = "f.conv1.weight", "f.layer1.0.conv1.weight", "f.layer2.0.conv1.bias", "class_output.weight"
GOOD, ONE = official_state(BATCH), np.arange(32) == 1


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (STEM, None, f"missing {STEM}"),
        ("f.bn1.running_mean", None, r"missing f.bn1.running_mean: expected an array \[64\]"),
        (3, GOOD[BIAS], "unexpected 3"),
        ("module.f.conv1.bias", np.zeros(16), "unexpected module.f.conv1.bias: a WRN-10-1 with norm batch"),
        (STEM, GOOD[STEM][:, :, 0], r"f.conv1.weight is \[16, 3, 3\]: expected \[16, ch"),
        (STEM, GOOD[STEM][:, :, :1], r"f.conv1.weight is \[16, 3, 1, 3\]: expected"),
        (BLOCK, GOOD[BLOCK][:8], r"is \[8, 16, 3, 3\]: expected \[16·width"),
        (CLASSES, GOOD[CLASSES].T, "class_output.*expected"),
        (BIAS, np.where(ONE, np.nan, GOOD[BIAS]), f"{BIAS}: 1 of 32 numbers are NaN or infinite"),
        (BIAS, np.where(ONE, 1e300, np.zeros(32)), f"{BIAS}: 1 of 32 numbers are NaN"),
        (BIAS, np.zeros(32, np.int32), f"{BIAS} is of int32: expected float32"),
        ("f.bn1.running_var", np.full(64, -1.0), "f.bn1.running_var holds a negative number"),
    ],
)
def test_a_wrong_state_dict_is_refused(name, array, message):
    with pytest.raises(UserError, match=message) as error:
        torch_import.variables_from_state_dict(replaced(GOOD, name, array))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("state", "norm", "message"),
    [
        ([1], None, "got a list"),
        (GOOD, "layer", "norm='layer' does not fit .* norm batch"),
        (official_state(LAYER), "group", "norm must be one of none, batch, .*, not 'group'"),
        (official_state(LAYER), None, 'give norm="layer" or norm="instance"'),
    ],
)
def test_what_is_no_state_dict_and_a_norm_that_does_not_fit_are_refused(state, norm, message):
    with pytest.raises(UserError, match=message):
        torch_import.variables_from_state_dict(state, norm)


def test_what_is_no_wide_resnet_or_has_not_its_variables_is_not_exported():
    with pytest.raises(UserError, match="no Dense: expected a WideResNet"):
        torch_import.state_dict_from_variables(nn.Dense(3), {"params": {}})
    model, variables = imported(BATCH)
    leaves = traverse_util.flatten_dict(variables, sep="/")
    for path, change, message in (
        ("batch_stats/norm/norm/mean", None, r"missing batch_stats/norm/norm/mean: expected an array \[64\] in a WRN"),
        ("params/conv1/kernel", np.zeros((1, 3, 3, 3, 16)), r"conv1/kernel is .*, 16\]: expected \[3, 3, 3, 16\]"),
    ):
        wrong = traverse_util.unflatten_dict(replaced(leaves, path, change), sep="/")
        with pytest.raises(UserError, match=message):
            torch_import.state_dict_from_variables(model, wrong)


def test_official_buffer_becomes_slots_and_classes():
    classes, slots = 3, 4
    official = np.arange(classes * slots * 2 * 5 * 6, dtype=np.float64).reshape(classes * slots, 2, 5, 6)
    buffer = torch_import.buffer_from_official(official, classes)
    assert buffer.shape == (slots, classes, 5, 6, 2)
    assert buffer.dtype == np.float32
    for slot, label in np.ndindex(slots, classes):  # the official sampler finds class y from row y·N/classes on
        np.testing.assert_array_equal(buffer[slot, label].transpose(2, 0, 1), official[label * slots + slot])
    np.testing.assert_array_equal(torch_import.buffer_to_official(buffer), official)
    assert torch_import.buffer_from_official(official).shape == (classes * slots, 1, 5, 6, 2)


@pytest.mark.parametrize(
    ("array", "classes", "message"),
    [
        (np.zeros((4, 3, 8)), 1, r"replay_buffer is \[4, 3, 8\]: expected \[images, channels, H, W\]"),
        (np.zeros((0, 3, 8, 8)), 1, r"replay_buffer is \[0, 3, 8, 8\]: expected"),
        (np.zeros((10, 3, 8, 8)), 3, "replay_buffer holds 10 images: expected a multiple of the 3 classes"),
    ],
)
def test_wrong_buffer_is_named(array, classes, message):
    with pytest.raises(UserError, match=message):
        torch_import.buffer_from_official(array, classes)


def test_a_missing_file_and_torch_that_is_missing_or_not_to_be_trusted_are_named(monkeypatch, tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            torch_import.read_checkpoint(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install "jem_jax\[torch\]"'):
        torch_import.read_checkpoint(CHECKPOINT)
    with pytest.raises(UserError, match=r'pip install "jem_jax\[torch\]"'):
        torch_import.write_checkpoint(tmp_path / "a.pt", official_state())
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.5.1"))
    with pytest.raises(UserError, match=r"torch 2\.5\.1 does not read foreign files safely"):
        torch_import.read_checkpoint(CHECKPOINT)


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
    assert not tiny.differing(state, official_state())
    assert images.shape == (20, 3, 32, 32)
    for class_conditional, shape in ((False, (20, 1, 32, 32, 3)), (True, (2, 10, 32, 32, 3))):
        model, variables, buffer = torch_import.load(CHECKPOINT, class_conditional=class_conditional)
        assert model == imported("wrn_10_1")[0]
        assert not tiny.differing(variables, imported("wrn_10_1")[1])
        assert buffer.shape == shape
        np.testing.assert_array_equal(buffer[1, 0], images[1].transpose(1, 2, 0))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("place", "legacy", "dtype"),
    [(None, False, "float32"), (None, True, "float32"), ("state_dict", False, "float32"), ("net", False, "bfloat16")],
)
def test_state_dicts_of_either_format_are_found_where_people_put_them(torch, tmp_path, place, legacy, dtype):
    tensors = {key: torch.tensor(array, dtype=getattr(torch, dtype)) for key, array in official_state().items()}
    state = {key: torch.nn.Parameter(tensor) for key, tensor in tensors.items()}
    content = {"epoch": 3, "optimizer": {"lr": 0.1}, place: state} if place else state
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    read, images = torch_import.read_checkpoint(path)
    assert images is torch_import.load(path).buffer is None
    assert not tiny.differing(read, {key: tensor.float().numpy() for key, tensor in tensors.items()})


@pytest.mark.torch
def test_a_written_checkpoint_is_read_back_and_a_failed_write_leaves_it(torch, tmp_path, monkeypatch):
    state = torch_import.state_dict_from_variables(*imported(BATCH))
    images = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
    path = tmp_path / "official.pt"
    path.write_bytes(b"an older file")
    for written in (None, images):
        torch_import.write_checkpoint(path, state, written)
        read, buffer = torch_import.read_checkpoint(path)
        assert not tiny.differing(read, state)
        np.testing.assert_array_equal(buffer, written)
        assert len(torch.load(path)["replay_buffer"]) == (0 if written is None else 6)

    def full_disk(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        torch_import.write_checkpoint(path, official_state())
    np.testing.assert_array_equal(torch_import.read_checkpoint(path)[1], images)
    assert [file.name for file in tmp_path.iterdir()] == ["official.pt"]


@pytest.mark.torch
@pytest.mark.parametrize("how", ["torch.save", "torch.save before 1.6", "inside the buffer", "pickle 2", "pickle 4"])
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
    reason = "it is damaged or of another kind" if how == "pickle 4" else r"it holds \w+\.open, and nothing but tensors"
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
    # The list of parts holds one that is none; and half of the file.
    for damaged in (b"nope".join(bytes(content).rsplit(b"PK\x01\x02", 1)), content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"changed\.pt is not a checkpoint .*: it is damaged"):
            torch_import.read_checkpoint(path)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda tensor: [1, 2], "holds no state dict"),
        (lambda tensor: {}, "holds no state dict"),
        (lambda tensor: {"a": 3}, "a is a int: expected a tensor"),
        (lambda tensor: {"a": tensor, "replay_buffer": [1]}, "replay_buffer is a list: expected a tensor"),
        (lambda tensor: {"a": tensor.to_sparse()}, "a is not an ordinary tensor"),
        (lambda tensor: {"a": tensor}, "missing f.conv1.weight"),
        (
            lambda tensor: {"replay_buffer": tensor[None, None]} | {key: tensor.new_tensor(GOOD[key]) for key in GOOD},
            r"replay_buffer is \[1, 1, 2, 2\]: expected \[N, 3, H, W\]",
        ),
    ],
)
def test_other_contents_are_named(torch, tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content(torch.eye(2)), path)
    with pytest.raises(UserError, match=rf"other\.pt:? .*{message}") as error:
        torch_import.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.torch
def test_the_stored_arrays_are_those_the_copy_gives(torch_copy):
    arrays = torch_copy.arrays()
    assert arrays.keys() == stored(COPY).keys() - {"meta"}
    for key, value in arrays.items():
        assert_close(stored(COPY)[key], value, 1e-10)


@pytest.mark.torch
@pytest.mark.parametrize("norm", NORMS)
def test_exports_load_strictly_and_give_the_same_logits(torch, torch_copy, norm):
    """So the copy is one of the official network, whose logits and names ours are."""
    model, variables, x = random_network(norm, width=2, num_classes=100)
    state = torch_import.state_dict_from_variables(model, variables)
    network = torch_copy.load(state, width=2, num_classes=100, norm=norm)
    assert state.keys() == network.state_dict().keys()
    logits = network(torch.tensor(nchw(x)).double()).detach().numpy()
    assert_close(jax.jit(model.apply)(variables, x), logits, 1e-5)
