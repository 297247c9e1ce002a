"""One training iteration: what it exchanges between devices, what it undoes, and that every setting trains."""

import functools
import re

import compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import tiny

from jem_jax import objective, sam
from jem_jax.augment import to_float
from jem_jax.datasets.batches import Stream
from jem_jax.distributed import devices
from jem_jax.training import divergence, quantities

DEVICES = 4
UNALTERED = {"data.pad": 0, "data.flip": False, "data.input_noise": 0.0}
PLAIN = {**UNALTERED, "sampler.noise_std": 0.0, "sampler.reinit_prob": 0.0}
"""Nothing is drawn at random but which images and slots."""
CONDITIONAL = {"sampler.class_conditional": True, "sampler.buffer_size": 96}
EVERY_WEIGHT = {
    "objective.p_x": 0.7,
    "objective.p_y_given_x": 1.5,
    "objective.energy_l2": 0.1,
    "sampler.step_size": 5.0,
    "optimizer.clip_norm": 0.01,
    **CONDITIONAL,
}
CASES = {
    "an example at a time": EVERY_WEIGHT,
    "shared batch": {
        **EVERY_WEIGHT,
        "model.factory": "tiny:plain_batch_norm_mlp",
        "objective.share_batch": True,
        "training.batch_size": 16,
    },
    "p(x, y)": {
        "objective.p_x": 0.0,
        "objective.p_xy": 1.0,
        "sampler.buffer_size": 96,
        "sampler.step_size": 5.0,
        "sampler.grad_clip": 0.05,
        "sampler.clip_x": True,
    },
    "SAM": {
        "model.factory": "tiny:plain_batch_norm_mlp",
        "sampler.batch_statistics": True,
        "optimizer.sam_rho": 0.5,
        "optimizer.sam_adaptive": True,
        "optimizer.weight_decay": 0.1,
        "optimizer.ema_decay": 0.75,
        "training.batch_size": 16,
        "training.labelled_batch_size": 32,
    },
}
"""What an iteration computes is compared in these with the algorithm."""


def _compiled(**settings):
    """A run's start, its step compiled ahead as the loop does, for arguments of these shapes alone; and its program,
    optimised with all of XLA's optimisations."""
    start = tiny.start(tiny.config(**settings))
    mapped, places = start.step.func, start.step.args
    program = mapped.lower(*places, start.state, start.buffer, start.data.at(0)).compile(compilation.hlo_of_users())
    step = lambda *arguments: jax.block_until_ready(program(*places, *arguments))  # noqa: E731
    return start._replace(step=step), program.as_text()


@pytest.fixture(scope="module")
def full_program():
    """A run with all that a state can hold: batch statistics, Adam's moments, averaged parameters; and dropout. Its
    images are shifted."""
    return _compiled(**tiny.FULL, **UNALTERED | {"data.pad": 3})


@pytest.fixture(scope="module")
def full(full_program):
    return full_program[0]


@pytest.fixture(scope="module")
def sharp_program():
    """A JEM whose loss has a second gradient."""
    return _compiled(**PLAIN, **CASES["SAM"])


def _losses(state):
    return {name: float(value) for name, value in state.window.sums.items()}


# The compiled program


@pytest.mark.parametrize(("run", "meetings"), [("full", 1), ("sharp", 2)])
def test_a_gradient_is_one_all_reduce_the_chain_none_and_the_buffer_is_not_copied(run, meetings, request):
    start, text = request.getfixturevalue(f"{run}_program")
    assert f"num_partitions={DEVICES}" in text
    hlo = scripts.load("hlo").Hlo(text, turns=3)
    assert [found["kind"] for found in hlo.collectives()] == meetings * ["all-reduce"]
    loops = [[op.kind for op in hlo.all(body)] for body in re.findall(r"\swhile\(.*body=%([\w.\-]+)", text)]
    assert sum("dot" in kinds for kinds in loops) == 1, "the chain's"
    assert not any("all-reduce" in kinds for kinds in loops)
    assert hlo.host_transfers() == 0
    assert not re.search(r"callback|collective-broadcast\(|ragged-all-to-all\(", text)
    of_the_buffer = re.escape(f"f32[1,{','.join(map(str, start.buffer.shape[1:]))}]")
    assert set(re.findall(rf" = {of_the_buffer}\S* ([\w-]+)\(", text)) == {"parameter", "bitcast"}


def test_a_step_updates_the_buffer_in_place_and_moves_nothing_between_host_and_devices(full):
    old = full.buffer
    state, buffer = full.step(full.state, old, full.data.at(0))
    assert old.is_deleted()
    with jax.transfer_guard("disallow_explicit"):
        for number in (1, 2):
            state, buffer = full.step(state, buffer, full.data.at(number))
        jax.block_until_ready((state, buffer))
    unplaced = full.data.at(3)._replace(order=np.array(full.data.at(3).order))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        full.step(state, buffer, unplaced)


def test_the_chain_takes_as_many_steps_in_a_turn_as_the_settings_say():
    start = tiny.start(tiny.config(**{"model.factory": "tiny:mlp", "sampler.unroll": 3}))
    mapped, places = start.step.func, start.step.args
    with_places = lambda *arguments: mapped(*places, *arguments)  # noqa: E731
    program = str(jax.make_jaxpr(with_places)(start.state, start.buffer, start.data.at(0)))
    assert re.findall(r"unroll=(\d+)", program) == ["3"]


# Devices


FIRST_STEPS = {
    **EVERY_WEIGHT,
    "model.factory": "tiny:mlp",
    "data.augment_p_x": False,
    "objective.p_xy": 0.5,
    "sampler.step_size": 1.0,
    "sampler.init": "class_gaussians",
    "sampler.reinit_prob": 0.5,
    "sampler.clip_x": True,
    "optimizer.sam_rho": 0.5,
    "optimizer.sam_adaptive": True,
    "training.labelled_batch_size": 16,
    "recovery.max_gap": 1e-9,
    "recovery.patience": 2,
}


def _first_steps():
    """The summed metrics after each of three iterations; at the end parameters, optimiser state, watch and buffer."""
    start = tiny.start(tiny.config(**FIRST_STEPS))
    state, buffer, results = start.state, start.buffer, {}
    for number in range(3):
        state, buffer = start.step(state, buffer, start.data.at(number))
        results |= {f"{number}/{name}": value for name, value in tiny.leaves(state.window.sums).items()}
    end = {"params": state.params, "opt_state": state.opt_state, "buffer": tiny.whole(buffer), "watch": state.watch}
    return results | tiny.leaves(end)


def test_one_two_and_four_devices_take_the_same_first_steps(use_devices):
    expected = _first_steps()
    for count in (1, 2):
        use_devices(count)
        assert devices.count() == count
        found = _first_steps()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6 * np.abs(value).max(), err_msg=name)


# Iterations that are undone


def _second_step(full, poison):
    """State and buffer after a first good iteration, and after a second one with something wrong in it."""
    state, buffer = full.step(full.state, full.buffer, full.data.at(0))
    before = state, tiny.whole(buffer)
    data = full.data.at(1)
    if poison == "label":
        # Of the last device's last example alone.
        labels = np.array(data.labels)
        labels[np.array(data.labelled_order)[15]] = tiny.CLASSES
        data = data._replace(labels=devices.replicate(labels))
    elif poison == "chains":
        # Those of one device alone.
        chains = before[1].copy()
        chains[8:16] = np.nan
        buffer, before = devices.shard_buffer(chains), (before[0], chains)
    elif poison == "log_density":
        # Finite, and past its bound.
        classes = {**state.params["classes"], "bias": devices.replicate(np.float32([0, 0, 1e7]))}
        state = state._replace(params={**state.params, "classes": classes})
        before = state, before[1]
    else:
        assert poison == "nothing"
    return before, full.step(state, buffer, data)


KEPT = ("params", "model_state", "opt_state", "ema", "key")


@pytest.mark.parametrize("poison", ["label", "chains", "log_density"])
def test_an_iteration_that_is_not_finite_or_runs_away_leaves_everything_as_it_was(full, poison):
    (old, chains), (new, buffer) = _second_step(full, poison)
    for field in KEPT:
        assert not tiny.differing(getattr(old, field), getattr(new, field)), field
    assert not tiny.differing(chains, tiny.whole(buffer))
    assert (int(new.step), int(new.window.steps), int(new.watch.step)) == (2, 2, 1)
    assert np.isfinite(list(_losses(new).values())).all() == (poison == "log_density")


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


def test_an_iteration_that_is_not_finite_in_its_first_of_two_passes_is_undone(sharp_program):
    sharp, _ = sharp_program
    bias = devices.replicate(np.full(tiny.CLASSES, np.inf, np.float32))
    params = {**sharp.state.params, "classes": {**sharp.state.params["classes"], "bias": bias}}
    state, buffer = sharp.step(sharp.state._replace(params=params), sharp.buffer, sharp.data.at(0))
    assert int(state.watch.step) == 0
    assert not tiny.differing(state.params, params)
    assert not tiny.differing(tiny.whole(buffer), sharp.chains)


# What an iteration computes


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


def _batches(config, number):
    """The plain images of an iteration's two streams, and the labels of the second."""
    train, found = tiny.dataset().train, []
    for stream, size in enumerate(config.training.batch_sizes):
        epoch, place = divmod(number, len(train) // size)
        rows = Stream(config.seed, stream, len(train), size).order(epoch)[size * place : size * (place + 1)]
        found += [to_float(train.images[rows]), train.labels[rows]]
    return found[0], found[2], found[3]


NUMBER = 7
"""an iteration of the second epoch"""


def _ends(start, config, slots, classes):
    """The ends [B, ...] of chains, which follow log p~(x, y) where they have classes."""
    sampler, network, key = config.sampler, start.network, jax.random.key(0)
    variables = {**start.state.model_state, "params": start.state.params}

    def density(x, classes):
        # By batch statistics the density is that of a device's own chains together.
        logits = network.batch_logits(variables, x, key) if sampler.batch_statistics else network.logits(variables, x)
        of_class = logits[np.arange(len(x)), classes]
        return (of_class if start.chains.shape[1] > 1 else jax.scipy.special.logsumexp(logits, axis=1)).sum()

    score, limit = jax.jit(jax.vmap(jax.grad(density))), sampler.grad_clip or np.inf
    x, classes = _by_device(start.chains[slots, classes]), _by_device(classes)
    for _ in range(sampler.num_steps):
        x = x + sampler.step_size * np.clip(score(x, classes), -limit, limit)
        x = np.clip(x, -1, 1) if sampler.clip_x else x
    return x.reshape(-1, *x.shape[2:])


def _by_device(batch):
    return batch.reshape(DEVICES, -1, *batch.shape[1:])


def _loss(start, config, batches, labels, classes):
    """Parameters -> the loss, its terms, and what passes leave: means over devices, which normalise their own part."""
    weights = config.objective

    def part(params, batches, labels, classes):
        # Images of the data pass last, and count most in the running statistics.
        order = ("labelled", "negatives", "data") if "data" in batches else ("negatives", "labelled")
        passes, variables = [batches[name] for name in order], {**start.state.model_state, "params": params}
        logits, statistics = start.network.train_logits(variables, passes, jax.random.key(0))
        logits = dict(zip(order, logits, strict=True))
        log_px = {name: jax.scipy.special.logsumexp(each, axis=1) for name, each in logits.items()}
        data, samples = log_px.get("data", log_px["labelled"]), log_px["negatives"]
        picked = logits["labelled"][np.arange(len(labels)), labels]
        contrast = logits["negatives"][np.arange(len(classes)), classes].mean() - picked.mean()
        terms = {"log_px_data": data.mean(), "log_px_samples": samples.mean()}
        terms["cross_entropy"] = (log_px["labelled"] - picked).mean()
        loss = weights.p_y_given_x * terms["cross_entropy"] + weights.p_xy * contrast
        loss += weights.p_x * (samples.mean() - data.mean())
        loss += weights.energy_l2 * ((data**2).mean() + (samples**2).mean())
        return loss, {**terms, "loss": loss}, statistics

    def mean(params):
        arguments = jax.tree.map(_by_device, (batches, labels, classes))
        found = jax.vmap(part, (None, 0, 0, 0))(params, *arguments)
        loss, *more = jax.tree.map(lambda leaf: leaf.mean(axis=0), found)
        return loss, more

    return mean


@pytest.mark.parametrize("case", CASES)
def test_an_iteration_is_the_algorithm(case, monkeypatch, request):
    config = tiny.config(**{"model.factory": "tiny:mlp", **PLAIN, **CASES[case]})
    start = request.getfixturevalue("sharp_program")[0] if case == "SAM" else tiny.start(config)
    with monkeypatch.context() as patch:
        # On a CPU large images pass an example at a time.
        patch.setattr("jem_jax.training.network._CPU_PIXELS", tiny.SIDE**2 if "example" in case else 2**13)
        first = start.state._replace(step=devices.replicate(np.int32(NUMBER)))
        state, buffer = start.step(first, start.buffer, start.data.at(NUMBER))
    old, new = start.chains, tiny.whole(buffer)
    slots, classes = np.nonzero(np.any(new != old, axis=(2, 3, 4)))
    assert (slots * config.training.batch_size // 32).tolist() == list(range(config.training.batch_size))
    data, labelled, labels = _batches(config, NUMBER)
    if config.objective.p_xy:
        assert classes.tolist() == labels.tolist()
    else:
        assert len(set(classes.tolist())) > 1 or new.shape[1] == 1
    np.testing.assert_allclose(new[slots, classes], _ends(start, config, slots, classes), rtol=1e-4, atol=1e-5)

    batches = {"labelled": labelled, "negatives": new[slots, classes]}
    if config.objective.p_x and not config.objective.share_batch:
        batches["data"] = data
    loss = jax.jit(jax.grad(_loss(start, config, batches, labels, classes), has_aux=True))
    params = jax.device_get(start.state.params)
    gradients, (terms, statistics) = loss(params)
    settings = config.optimizer
    if settings.sam_rho:
        flat, gradients = gradients, loss(sam.ascend(params, gradients, settings.sam_rho, adaptive=True))[0]
        assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (flat, gradients)), strict=True)) > 2e-3
    norm, scale = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients))), 1.0
    if settings.clip_norm:
        terms, scale = {**terms, "gradient_norm": norm}, settings.clip_norm / norm
        assert scale < 0.5
    sums = _losses(state)
    for name in terms.keys() & sums.keys():
        assert sums[name] == pytest.approx(float(terms[name]), rel=1e-4), name
    # Weight decay is that of the weights that move, not of those climbed to.
    moved = jax.tree.map(lambda w, g: w - 0.05 * (scale * g + settings.weight_decay * w), params, gradients)
    expected = {"params": moved, "statistics": statistics}
    found = {"params": state.params, "statistics": state.model_state}
    if settings.ema_decay:
        expected["ema"] = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params, moved)
        found["ema"] = state.ema
    found = tiny.leaves(found)
    for name, value in tiny.leaves(expected).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


AFRESH = {"data.augment_p_x": False, "sampler.noise_std": 0.0, "sampler.reinit_prob": 1.0}
ALTERED = {
    "noisy": {
        "data.input_noise": 0.5, "data.augment_p_x": False, "sampler.noise_std": 0.5, "sampler.reinit_prob": 0.0,
    },
    "shifted where labelled": {"data.pad": 3, **AFRESH},
    "mirrored where labelled": {"data.flip": True, "sampler.init": "class_gaussians", **AFRESH, **CONDITIONAL},
}  # fmt: skip
"""How images are altered; and, which other tests look at, what chains do beside following their gradient."""


@functools.cache
def _one_step(name):
    """A run's start, its state after an iteration without gradients in the chains, and what was written [8, 8, 8, 1]
    to which slots and classes."""
    start = tiny.start(
        tiny.config(**{"model.factory": "tiny:mlp", "sampler.step_size": 1e-9, **UNALTERED, **ALTERED[name]})
    )
    state, buffer = start.step(start.state, start.buffer, start.data.at(0))
    places = np.nonzero(np.any(tiny.whole(buffer) != start.chains, axis=(2, 3, 4)))
    return start, state, tiny.whole(buffer)[places], places


def _altered(start, state):
    """Whether the first iteration altered the images of p(x), and the labelled ones."""
    data, labelled, labels = _batches(tiny.config(), 0)
    logits = np.array(jax.jit(start.network.logits)({"params": start.state.params}, np.concatenate([data, labelled])))
    log_z = np.logaddexp.reduce(logits, axis=1)
    plain = {"log_px_data": log_z[:8].mean(), "cross_entropy": (log_z[8:] - logits[8:][np.arange(8), labels]).mean()}
    return [_losses(state)[name] != pytest.approx(value, rel=1e-5) for name, value in plain.items()]


def test_images_of_p_x_are_shifted_as_labelled_ones_are(full):
    plain = np.sqrt(np.mean(_batches(tiny.config(), 0)[0] ** 2))
    state, _ = full.step(full.state, full.buffer, full.data.at(0))
    assert _losses(state)["data_rms"] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ALTERED)
def test_with_augment_p_x_off_images_of_p_x_get_noise_alone(name):
    start, state, _, _ = _one_step(name)
    assert _altered(start, state) == [name == "noisy", True]


def test_every_step_of_a_chain_adds_the_noise_that_is_set():
    start, _, found, places = _one_step("noisy")
    moved = found - start.chains[places]
    assert moved.std() == pytest.approx(0.5 * np.sqrt(3), rel=0.1)
    assert moved.mean() == pytest.approx(0, abs=0.1)


def test_chains_that_start_afresh_do_so_where_it_is_set():
    _, _, uniform, _ = _one_step("shifted where labelled")
    assert np.abs(uniform).max() <= 1
    assert uniform.std() == pytest.approx(1 / np.sqrt(3), rel=0.1)
    start, _, gaussian, (_, classes) = _one_step("mirrored where labelled")
    starts = np.array(start.data.at(0).starts)
    starts = starts.reshape(*starts.shape[:2], *gaussian.shape[1:])
    for x, label in zip(gaussian, classes, strict=True):
        assert np.isclose(starts[:, label], x, atol=1e-5).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize(("clip", "rms"), [(False, divergence.MAX_RMS), (True, divergence.MAX_CLIPPED_RMS)])
def test_the_watch_holds_to_the_limits_that_are_set(clip, rms):
    config = tiny.config(**{"recovery.max_gap": 7.0, "recovery.patience": 3, "sampler.clip_x": clip})
    assert quantities.limits(config) == divergence.Limits(7.0, rms, 3)


def test_a_gap_that_energy_l2_bounds_is_noticed_at_half_the_bound():
    held = tiny.config(**{"objective.p_x": 0.4, "objective.energy_l2": 0.01})
    weights = quantities.weights(held)

    def loss(gap):
        # Logits of one class: log p~ is the logit. Cross-entropy is then 0.
        logits = [jnp.full((1, 1), value) for value in (0.0, gap / 2, -gap / 2)]
        return objective.joint_loss(objective.Logits(*logits), jnp.zeros(1, jnp.int32), weights)[0]

    gaps = np.linspace(0, 100, 101)
    widest = gaps[np.argmin(jax.jit(jax.vmap(loss))(gaps))]
    assert quantities.limits(held).max_gap == pytest.approx(widest / 2)
