"""One training iteration: what it exchanges between devices, what it undoes, and that every setting trains."""

import re

import compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import tiny

from jem_jax import objective
from jem_jax.augment import to_float
from jem_jax.config import Config
from jem_jax.datasets.batches import Stream
from jem_jax.distributed import devices
from jem_jax.training import divergence, quantities
from jem_jax.training.quantities import weights

DEVICES = 4
CLASSIFIER = {**tiny.FULL, "data.pad": 0, "data.input_noise": 0.0, "objective.p_x": 0.0}
_COMMUNICATION = re.compile(
    r"\s(all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    r"|infeed|outfeed|send|recv)(?:-start)?\("
)


@pytest.fixture(scope="module")
def wrn():
    """A JEM as the defaults have it."""
    start = tiny.start(tiny.config())
    start.step(start.state, start.buffer, start.data.at(0))
    return start


@pytest.fixture(scope="module")
def full():
    """A run with all that a state can hold: batch statistics, Adam's moments, averaged parameters; and dropout."""
    start = tiny.start(tiny.config(**tiny.FULL))
    start.step(start.state, start.buffer, start.data.at(0))
    return start


def _losses(state):
    return {name: float(value) for name, value in state.window.sums.items()}


# The compiled program


def _as_users_compile(start: tiny.Start) -> str:
    """The optimised HLO of a step, with all optimisations."""
    mapped, places = start.step.func, start.step.args
    lowered = mapped.lower(*places, start.state, start.buffer, start.data.at(0))
    return lowered.compile(compilation.hlo_of_users()).as_text()


def _reached(computations: dict[str, str], name: str) -> set[str]:
    """A computation and all that it calls."""
    seen, to_see = set(), [name]
    while to_see:
        one = to_see.pop()
        if one not in seen:
            seen.add(one)
            to_see += [found for found in re.findall(r"%([\w.\-]+)", computations[one]) if found in computations]
    return seen


SGD = {"model.factory": "tiny:mlp", "optimizer.name": "sgd", "optimizer.learning_rate": 1.0}


@pytest.fixture(scope="module")
def sharp():
    """A JEM whose loss has a second gradient."""
    return tiny.start(tiny.config(**{"model.factory": "tiny:mlp", "optimizer.sam_rho": 0.1}))


@pytest.mark.parametrize(("run", "meetings"), [("wrn", 1), ("full", 1), ("sharp", 2)])
def test_a_gradient_is_one_all_reduce_the_chain_none_and_the_buffer_is_not_copied(run, meetings, request):
    start = request.getfixturevalue(run)
    hlo = _as_users_compile(start)
    assert f"num_partitions={DEVICES}" in hlo
    computations = scripts.load("described").computations(hlo)
    assert _COMMUNICATION.findall("".join(computations.values())) == meetings * ["all-reduce"]
    assert "callback" not in hlo
    bodies = re.findall(r"\swhile\(.*body=%([\w.\-]+)", hlo)
    loops = ["".join(computations[name] for name in _reached(computations, body)) for body in bodies]
    chains = [loop for loop in loops if re.search(r"\s(convolution|dot)\(", loop)]
    assert len(chains) == 1
    assert not any(_COMMUNICATION.search(loop) for loop in loops)
    of_the_buffer = re.escape(f"f32[1,{','.join(map(str, start.buffer.shape[1:]))}]")
    made = re.findall(rf" = {of_the_buffer}\S* ([\w-]+)\(", hlo)
    assert set(made) == {"parameter", "bitcast"}


def test_the_norm_of_the_whole_gradient_is_limited_and_recorded():
    changes = {}
    for limit in (0.0, 0.01):
        run = tiny.start(tiny.config(**SGD | {"optimizer.clip_norm": limit}))
        before = tiny.leaves(run.state.params)
        state, _ = run.step(run.state, run.buffer, run.data.at(0))
        after = tiny.leaves(state.params)
        changes[limit] = np.sqrt(sum(np.sum((after[name] - before[name]) ** 2) for name in before))
    assert changes[0.01] == pytest.approx(0.01, rel=1e-4)
    assert state.window.sums["gradient_norm"] == pytest.approx(changes[0.0], rel=1e-4)


def test_a_step_moves_nothing_between_host_and_devices(wrn):
    state, buffer = wrn.step(wrn.state, wrn.buffer, wrn.data.at(0))
    with jax.transfer_guard("disallow_explicit"):
        for number in (1, 2):
            state, buffer = wrn.step(state, buffer, wrn.data.at(number))
        jax.block_until_ready((state, buffer))
    unplaced = wrn.data.at(3)._replace(order=np.array(wrn.data.at(3).order))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        wrn.step(state, buffer, unplaced)


def test_the_buffer_is_updated_in_place(full):
    buffer = full.buffer
    full.step(full.state, buffer, full.data.at(0))
    assert buffer.is_deleted()


@pytest.mark.parametrize("unroll", [1, 3])
def test_the_chain_takes_as_many_steps_in_a_turn_as_the_settings_say(unroll):
    start = tiny.start(tiny.config(**{"model.factory": "tiny:mlp", "sampler.unroll": unroll}))
    mapped, places = start.step.func, start.step.args
    with_places = lambda *arguments: mapped(*places, *arguments)  # noqa: E731
    program = str(jax.make_jaxpr(with_places)(start.state, start.buffer, start.data.at(0)))
    assert re.findall(r"unroll=(\d+)", program) == [str(unroll)]


def test_one_program_serves_all_iterations(full):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        state, buffer = full.step(full.state, full.buffer, full.data.at(0))
        compiled.clear()
        for number in range(1, 7):
            state, buffer = full.step(state, buffer, full.data.at(number))
        assert not [name for name in compiled if "compile" in name]
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_step_gives_the_same_bits_every_time(wrn):
    first, second = (wrn.step(wrn.state, wrn.buffer, wrn.data.at(0)) for _ in range(2))
    assert not tiny.differing(first, second)


# Devices


FIRST_STEPS = {
    # Without a leaky ReLU's kink, which another rounding can turn the other way: a gradient's fourth digit.
    "wrn": {"model.activation": "swish"},
    "every_term": {
        "model.factory": "tiny:mlp",
        "objective.p_xy": 0.5,
        "objective.energy_l2": 0.1,
        "sampler.class_conditional": True,
        "sampler.buffer_size": 48,
        "optimizer.weight_decay": 0.01,
        "recovery.max_gap": 1e-9,
        "recovery.patience": 2,
    },
    "successors": {
        "model.factory": "tiny:mlp",
        "data.augment_p_x": False,
        "sampler.init": "class_gaussians",
        "sampler.reinit_prob": 0.5,
        "sampler.clip_x": True,
        "optimizer.sam_rho": 0.5,
        "optimizer.sam_adaptive": True,
        "training.labelled_batch_size": 16,
    },
}


def _first_steps(settings):
    """The summed metrics after each of three iterations; at the end parameters, optimiser state, watch and buffer."""
    start = tiny.start(tiny.config(**settings))
    state, buffer, results = start.state, start.buffer, {}
    for number in range(3):
        state, buffer = start.step(state, buffer, start.data.at(number))
        results |= {f"{number}/{name}": value for name, value in tiny.leaves(state.window.sums).items()}
    end = {"params": state.params, "opt_state": state.opt_state, "buffer": tiny.whole(buffer), "watch": state.watch}
    return results | tiny.leaves(end)


@pytest.mark.slow
@pytest.mark.parametrize("run", FIRST_STEPS)
def test_one_two_and_four_devices_take_the_same_first_steps(run, use_devices):
    expected = _first_steps(FIRST_STEPS[run])
    for count in (1, 2):
        use_devices(count)
        assert devices.count() == count
        found = _first_steps(FIRST_STEPS[run])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("log_px_max"):  # a mean over devices of each device's largest
                continue
            scale = np.abs(value).max()
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("augmentation", [{"data.pad": 3}, {"data.flip": True}, {"data.input_noise": 0.5}])
def test_images_of_p_x_are_shifted_and_mirrored_only_where_they_are_to_be_but_all_get_noise(augmentation, augmented):
    plain = {"data.pad": 0, "data.flip": False, "data.input_noise": 0.0, "data.augment_p_x": augmented}
    config = tiny.config(**{"model.factory": "tiny:mlp", **plain, **augmentation})
    start = tiny.start(config)
    state, _ = start.step(start.state, start.buffer, start.data.at(0))
    images, params = tiny.dataset().train, jax.device_get(start.state.params)
    rows, labelled_rows = (Stream(config.seed, stream, len(images), 8).order(0)[:8] for stream in (0, 1))
    logits = start.network.logits({"params": params}, to_float(images.images[rows]))
    plain = jax.scipy.special.logsumexp(logits, axis=1).mean()
    altered = augmented or "data.input_noise" in augmentation
    assert (_losses(state)["log_px_data"] != pytest.approx(float(plain), rel=1e-5)) == altered
    logits = start.network.logits({"params": params}, to_float(images.images[labelled_rows]))
    plain = -jax.nn.log_softmax(logits)[np.arange(8), images.labels[labelled_rows]].mean()
    assert _losses(state)["cross_entropy"] != pytest.approx(float(plain), rel=1e-5)


PASSES = {
    "classifier in its second epoch": ({"objective.p_x": 0.0}, 7, ["labelled"]),
    "unshared": ({}, 0, ["labelled", "negatives", "data"]),
    "shared": ({"objective.share_batch": True}, 0, ["negatives", "labelled"]),
    "p_xy_alone": (
        {"objective.p_x": 0.0, "objective.p_xy": 1.0, "sampler.buffer_size": 96},
        0,
        ["negatives", "labelled"],
    ),
}
"""Settings, an iteration, and which batches pass in which order"""


@pytest.mark.parametrize("case", PASSES)
def test_running_statistics_are_those_of_the_passes_images_of_the_data_last(case):
    """The last pass counts most in the running statistics."""
    settings, number, order = PASSES[case]
    config = tiny.config(**{**CLASSIFIER, "objective.p_x": 1.0, "sampler.step_size": 1e4, **settings})
    start = tiny.start(config)
    state, buffer = start.step(start.state._replace(step=np.int32(number)), start.buffer, start.data.at(number))
    images = tiny.dataset().train.images
    epoch, place = divmod(number, len(images) // 8)
    streams = (Stream(config.seed, stream, len(images), 8).order(epoch) for stream in (0, 1))
    data, labelled = (to_float(images[rows[8 * place : 8 * place + 8]]) for rows in streams)
    batches = {"data": data, "labelled": labelled}
    assert (buffer is None) == (start.chains is None) == ("negatives" not in order)
    if buffer is not None:
        slots, classes = np.nonzero(np.any(tiny.whole(buffer) != start.chains, axis=(2, 3, 4)))
        batches["negatives"] = tiny.whole(buffer)[slots, classes]
    variables = jax.device_get({**start.state.model_state, "params": start.state.params})
    train_logits = jax.jit(start.network.train_logits)
    parts = [
        train_logits(variables, [batches[name][2 * i : 2 * i + 2] for name in order], jax.random.key(0))[1]
        for i in range(DEVICES)
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parts)
    for name, value in tiny.leaves(expected).items():
        np.testing.assert_allclose(tiny.leaves(state.model_state)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# Iterations that are undone


def _second_step(full, poison):
    """State and buffer after a first good iteration, and after a second one with something wrong in it."""
    state, buffer = full.step(full.state, full.buffer, full.data.at(0))
    before = state, tiny.whole(buffer)
    data = full.data.at(1)
    if poison == "parameter":
        bias = np.array(state.params["hidden"]["bias"])
        bias[3] = np.nan
        hidden = {**state.params["hidden"], "bias": devices.replicate(bias)}
        state = state._replace(params={**state.params, "hidden": hidden})
        before = state, before[1]
    elif poison == "label":
        # Of the last device's last example alone.
        labels = np.array(data.labels)
        labels[np.array(data.labelled_order)[15]] = tiny.CLASSES
        data = data._replace(labels=devices.replicate(labels))
    elif poison == "chains":
        # Those of one device alone.
        chains = before[1].copy()
        chains[8:16] = np.nan
        buffer, before = devices.shard_buffer(chains), (before[0], chains)
    else:
        assert poison == "nothing"
    return before, full.step(state, buffer, data)


KEPT = ("params", "model_state", "opt_state", "ema", "key")


@pytest.mark.parametrize("poison", ["parameter", "label", "chains"])
def test_an_iteration_that_is_not_finite_leaves_everything_as_it_was(full, poison):
    (old, chains), (new, buffer) = _second_step(full, poison)
    for field in KEPT:
        assert not tiny.differing(getattr(old, field), getattr(new, field)), field
    assert not tiny.differing(chains, tiny.whole(buffer))
    assert (int(new.step), int(new.window.steps), int(new.watch.step)) == (2, 2, 1)


def test_a_finite_iteration_changes_everything_but_the_key(full):
    (old, chains), (new, buffer) = _second_step(full, "nothing")
    for field in set(KEPT) - {"key"}:
        changed = tiny.differing(getattr(old, field), getattr(new, field))
        assert changed == sorted(tiny.leaves(getattr(old, field))), field
    assert not tiny.differing(old.key, new.key)
    written = np.any(chains != tiny.whole(buffer), axis=(1, 2, 3, 4))
    assert np.array_equal(written.reshape(8, 4).sum(axis=1), np.ones(8))
    assert (int(new.step), int(new.window.steps), int(new.watch.step)) == (2, 2, -1)


def test_the_first_undone_iteration_stays_recorded_and_the_next_good_one_trains(full):
    _, (undone, buffer) = _second_step(full, "label")
    state = undone
    for number in range(2, 6):  # past the end of the window
        state, buffer = full.step(state, buffer, full.data.at(number))
    assert int(state.watch.step) == 1
    assert np.isfinite(list(_losses(state).values())).all()
    assert tiny.differing(undone.params, state.params)


def test_log_densities_past_their_bound_undo_an_iteration():
    start = tiny.start(tiny.config(**tiny.FULL, **{"training.max_log_density": 1e-9}))
    state, buffer = start.step(start.state, start.buffer, start.data.at(0))
    for field in KEPT:
        assert not tiny.differing(getattr(start.state, field), getattr(state, field)), field
    assert not tiny.differing(start.chains, tiny.whole(buffer))
    assert int(state.watch.step) == 0
    assert np.isfinite(list(_losses(state).values())).all()


# What an iteration computes


def test_averaged_parameters_follow_their_formula(full):
    decay = tiny.FULL["optimizer.ema_decay"]
    expected = tiny.leaves(full.state.params)
    assert not tiny.differing(full.state.ema, full.state.params)
    state, buffer = full.state, full.buffer
    for number in range(3):
        state, buffer = full.step(state, buffer, full.data.at(number))
        new = tiny.leaves(state.params)
        expected = {name: decay * old + (1 - decay) * new[name] for name, old in expected.items()}
    for name, value in tiny.leaves(state.ema).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert not tiny.differing(state.evaluation_variables["params"], state.ema)


def test_the_window_holds_the_sums_of_single_iterations_since_the_last_log_line(full):
    state, buffer = full.state, full.buffer
    singles: list[dict[str, float]] = []
    for number in range(6):
        zero = devices.replicate({name: np.float32(0) for name in state.window.sums})
        alone, _ = full.step(state._replace(window=state.window._replace(sums=zero)), buffer + 0, full.data.at(number))
        state, buffer = full.step(state, buffer, full.data.at(number))
        # A line of the log every 4 iterations, so that the window begins anew at iterations 0 and 4.
        singles = [*(singles if number % 4 else []), _losses(alone)]
        assert int(state.window.steps) == len(singles)
        for name, total in _losses(state).items():
            np.testing.assert_allclose(total, sum(single[name] for single in singles), rtol=1e-5, err_msg=name)
    assert {"loss", "accuracy", "cross_entropy", "log_px_data", "log_px_samples"} <= singles[0].keys()


EXACT = {
    "model.factory": "tiny:mlp",
    "data.pad": 0,
    "data.input_noise": 0.0,
    "objective.p_x": 0.7,
    "objective.energy_l2": 0.1,
    "sampler.noise_std": 0.0,
    "sampler.reinit_prob": 0.0,
    "sampler.class_conditional": True,
    "sampler.buffer_size": 96,
    "sampler.step_size": 5.0,
}
"""Nothing random but the order of the images, the slots and the classes that are drawn."""


def _ascended(start, slots, classes):
    """Chains after three steps of 5 along the gradient of their classes' logits."""
    params, x = jax.device_get(start.state.params), start.chains[slots, classes]
    score = jax.grad(lambda x: start.network.logits({"params": params}, x)[np.arange(8), classes].sum())
    for _ in range(3):
        x = x + 5.0 * np.array(score(x))
    return x


@pytest.mark.parametrize("pixels", [2**13, tiny.SIDE**2], ids=["whole", "an_example_at_a_time"])
def test_an_iteration_is_the_algorithm(pixels, monkeypatch):
    monkeypatch.setattr("jem_jax.training.network._CPU_PIXELS", pixels)
    config = tiny.config(**EXACT)
    start = tiny.start(config)
    state, buffer = start.step(start.state, start.buffer, start.data.at(0))
    old, new = start.chains, tiny.whole(buffer)
    slots, classes = np.nonzero(np.any(new != old, axis=(2, 3, 4)))
    assert (slots // 4).tolist() == list(range(8))
    assert len(set(classes.tolist())) > 1

    x = _ascended(start, slots, classes)
    np.testing.assert_allclose(new[slots, classes], x, rtol=1e-4, atol=1e-5)

    params = jax.device_get(start.state.params)
    images = tiny.dataset().train
    data, labelled = (Stream(config.seed, stream, len(images), 8).order(0)[:8] for stream in (0, 1))
    labels = images.labels[labelled]

    def terms(params):
        log_px, logits = [], lambda x: start.network.logits({"params": params}, x)
        for batch in (to_float(images.images[data]), x):
            log_px.append(jax.scipy.special.logsumexp(logits(batch), axis=1))
        posterior = jax.nn.log_softmax(logits(to_float(images.images[labelled])))
        return {
            "cross_entropy": -posterior[np.arange(8), labels].mean(),
            "log_px_data": log_px[0].mean(),
            "log_px_samples": log_px[1].mean(),
            "l2": sum((one**2).mean() for one in log_px),
        }

    def loss(params):
        found = terms(params)
        return found["cross_entropy"] + 0.7 * (found["log_px_samples"] - found["log_px_data"]) + 0.1 * found["l2"]

    expected = {**terms(params), "loss": loss(params)}
    for name in ("cross_entropy", "log_px_data", "log_px_samples", "loss"):
        assert _losses(state)[name] == pytest.approx(float(expected[name]), rel=1e-4), name
    moved = jax.tree.map(lambda old, gradient: old - 0.05 * gradient, params, jax.grad(loss)(params))
    for name, value in tiny.leaves(moved).items():
        np.testing.assert_allclose(tiny.leaves(state.params)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def _one_step(**settings):
    """A run's start, its buffer [S, C, ...] after an iteration whose chains follow no gradient to speak of, and which
    slots and classes were written."""
    start = tiny.start(tiny.config(**{"model.factory": "tiny:mlp", "sampler.step_size": 1e-9, **settings}))
    _, buffer = start.step(start.state, start.buffer, start.data.at(0))
    after = tiny.whole(buffer)
    return start, after, np.nonzero(np.any(after != start.chains, axis=(2, 3, 4)))


def test_every_step_of_a_chain_adds_the_noise_that_is_set():
    start, after, written = _one_step(**{"sampler.noise_std": 0.5, "sampler.reinit_prob": 0.0})
    moved = after[written] - start.chains[written]
    assert moved.std() == pytest.approx(0.5 * np.sqrt(3), rel=0.1)
    assert moved.mean() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("init", ["uniform", "class_gaussians"])
def test_chains_that_start_afresh_do_so_where_it_is_set(init):
    settings = {"sampler.noise_std": 0.0, "sampler.reinit_prob": 1.0, "sampler.init": init}
    more = {"sampler.class_conditional": True, "sampler.buffer_size": 96}
    start, after, (slots, classes) = _one_step(**settings, **more)
    assert len(slots) == 8
    found = after[slots, classes]
    if init == "uniform":
        assert np.abs(found).max() <= 1
        assert found.std() == pytest.approx(1 / np.sqrt(3), rel=0.1)
        return
    starts = np.array(start.data.at(0).starts)
    starts = starts.reshape(*starts.shape[:2], *found.shape[1:])
    for x, label in zip(found, classes, strict=True):
        assert np.isclose(starts[:, label], x, atol=1e-5).all(axis=(1, 2, 3)).any()


def test_chains_of_p_x_given_y_follow_the_logit_of_their_label():
    settings = {"objective.p_x": 0.0, "objective.p_xy": 1.0, "sampler.buffer_size": 96, "data.pad": 0}
    chain = {"sampler.step_size": 5.0, "sampler.noise_std": 0.0, "sampler.reinit_prob": 0.0}
    start, after, (slots, classes) = _one_step(**settings, **chain)
    np.testing.assert_allclose(after[slots, classes], _ascended(start, slots, classes), rtol=1e-4, atol=1e-5)


def test_the_watch_holds_to_the_limits_that_are_set():
    settings = {"recovery.max_gap": 7.0, "recovery.patience": 3}
    clipped = {**settings, "sampler.clip_x": True}
    assert quantities.limits(tiny.config(**settings)) == divergence.Limits(7.0, divergence.MAX_RMS, 3)
    assert quantities.limits(tiny.config(**clipped)) == divergence.Limits(7.0, divergence.MAX_CLIPPED_RMS, 3)


def test_a_gap_that_energy_l2_bounds_is_noticed_at_half_the_bound():
    held = tiny.config(**{"objective.p_x": 0.4, "objective.energy_l2": 0.01})
    weights = quantities.weights(held)

    def loss(gap):
        # Logits of one class: log p~ is the logit. Cross-entropy is then 0.
        logits = [jnp.full((1, 1), value) for value in (0.0, gap / 2, -gap / 2)]
        return float(objective.joint_loss(objective.Logits(*logits), jnp.zeros(1, jnp.int32), weights)[0])

    widest = min(np.linspace(0, 100, 101), key=loss)
    assert quantities.limits(held).max_gap == pytest.approx(widest / 2)


VARIANTS = {
    "classifier": CLASSIFIER,
    "p_xy_alone_with_clipped_gradient": {
        "model.factory": "tiny:mlp",
        "data.flip": True,
        "data.pad_mode": "reflect",
        "objective.p_x": 0.0,
        "objective.p_xy": 1.0,
        "sampler.buffer_size": 96,
        "sampler.grad_clip": 1e-4,
        "sampler.noise_std": 0.0,
        "sampler.reinit_prob": 0.0,
        "sampler.step_size": 100.0,
    },
    "jempp": {
        "model.factory": "tiny:mlp",
        "sampler.class_conditional": True,
        "sampler.buffer_size": 96,
        "sampler.init": "class_gaussians",
        "sampler.clip_x": True,
        "sampler.step_size": 1e4,
    },
    "bfloat16_with_shared_batch_and_clipped_x": {
        "model.dtype": "bfloat16",
        "objective.share_batch": True,
        "sampler.clip_x": True,
        "sampler.step_size": 1e4,
    },
}


def _negatives_of(config: Config) -> int:
    """Chains that an iteration writes."""
    terms: objective.Weights = weights(config)
    return 8 * (terms.needs_negatives + terms.needs_conditional_negatives)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_iterations_train(variant):
    settings = VARIANTS[variant]
    config = tiny.config(**settings)
    start = tiny.start(config)
    state, buffer, old = start.state, start.buffer, start.chains
    for number in range(2):
        state, buffer = start.step(state, buffer, start.data.at(number))
        if old is not None:
            new = tiny.whole(buffer)
            written = np.any(new != old, axis=(2, 3, 4))
            assert new.shape == old.shape
            assert written.sum() == _negatives_of(config)
            if "sampler.grad_clip" in settings:
                furthest = np.abs(new - old).max()
                assert furthest == pytest.approx(3 * 100.0 * 1e-4, rel=1e-3)
            if config.objective.p_xy:
                # The chains of p(x | y) are those of the batch's labels.
                rows = Stream(config.seed, 1, tiny.TRAIN, 8).order(0)[8 * number : 8 * number + 8]
                labels = tiny.dataset().train.labels[rows]
                assert np.nonzero(written)[1].tolist() == labels.tolist()
            if "sampler.clip_x" in settings:
                assert np.abs(new).max() == 1
            old = new
    assert int(state.watch.step) == -1
    assert np.isfinite(list(_losses(state).values())).all()
    assert tiny.differing(start.state.params, state.params) == sorted(tiny.leaves(state.params))
    assert all(leaf.dtype == np.float32 for leaf in tiny.leaves(state.params).values())
    assert (old is None) == (config.objective.p_x == config.objective.p_xy == 0)
