"""Settings that change while a run goes on, and batch statistics re-estimated."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jem_jax.augment import to_float
from jem_jax.common.errors import UserError
from jem_jax.distributed import devices
from jem_jax.main import main
from jem_jax.runs import metrics
from jem_jax.training import loop, preflight, schedule, setup, statistics
from jem_jax.training.network import Network
from jem_jax.training.schedule import Phase, Program

EVERYTHING = {
    "model.factory": "tiny:plain_batch_norm_mlp",
    "optimizer.sam_rho": 0.1,
    "optimizer.ema_decay": 0.5,
    "sampler.batch_statistics": True,
    "schedule.learning_rate": "linear",
    "schedule.p_x_start": 0.2,
    "schedule.p_x_ramp": 0.4,
    "schedule.sam_start": 0.5,
    "schedule.freeze_norm": 0.8,
    "training.epochs": 2,
    "training.log_every": 1,
}
"""10 iterations: cross-entropy in 0 and 1, p(x) rising in 2 to 5, SAM from 5 on, batch norm frozen from 8 on"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of everything, without an interruption; and after how many iterations each program was compiled."""
    directory = tmp_path_factory.mktemp("schedule")
    compiled, iterations = [], []
    trace, iterate = devices.traced, loop._iterate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "traced", lambda *args: compiled.append(len(iterations)) or trace(*args))
        patch.setattr(loop, "_iterate", lambda training: iterations.append(1) or iterate(training))
        tiny.train(directory, **EVERYTHING)
    assert len(iterations) == 10
    (directory / "compiled.json").write_text(json.dumps(compiled))
    return directory


def test_phases_are_the_shares_of_a_run():
    config = tiny.config(**EVERYTHING)
    assert schedule.phases(config, 100) == (
        Phase(0, Program(needs_samples=False, num_steps=0, sam=False, frozen=False)),
        Phase(20, Program(needs_samples=True, num_steps=3, sam=False, frozen=False)),
        Phase(50, Program(needs_samples=True, num_steps=3, sam=True, frozen=False)),
        Phase(80, Program(needs_samples=True, num_steps=3, sam=True, frozen=True)),
    )


def test_chain_steps_follow_their_pairs():
    config = tiny.config(**{"schedule.num_steps": (0.0, 1, 0.25, 2, 0.5, 5)})
    found = [(phase.first, phase.program.num_steps) for phase in schedule.phases(config, 100)]
    assert found == [(0, 1), (25, 2), (50, 5)]


def test_the_weight_of_p_x_rises_linearly():
    settings = tiny.config(**{"schedule.p_x_start": 0.2, "schedule.p_x_ramp": 0.4}).schedule
    found = [float(schedule.p_x_factor(settings, 100, step)) for step in (0, 19, 20, 39, 59, 99)]
    np.testing.assert_allclose(found, [0, 0, 1 / 40, 0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule.num_steps": (0.1,)}, "shares, each with a whole K"),
        ({"schedule.num_steps": (0.1, 1.5)}, "shares, each with a whole K"),
        ({"schedule.num_steps": (0.5, 1, 0.2, 2)}, "increasing shares"),
        ({"schedule.num_steps": (1.0, 5)}, "increasing shares below 1"),
        ({"schedule.learning_rate": "linear", "optimizer.decay_epochs": (1,)}, "decay_epochs goes with"),
        ({"schedule.p_x_start": 0.6, "schedule.p_x_ramp": 0.5}, "at most 1 together"),
        ({"schedule.p_x_start": 0.5, "objective.p_y_given_x": 0.0}, "leaves nothing to learn"),
        ({"schedule.sam_start": 0.5}, "needs config.optimizer.sam_rho"),
        ({"schedule.freeze_norm": 0.5}, "needs config.model.norm=batch"),
        ({"schedule.freeze_norm": 0.5, "model.norm": "batch", "model.dropout": 0.1}, "needs config.model.dropout=0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny.config(**settings)


def test_more_than_four_programs_are_refused():
    config = tiny.config(**{"schedule.num_steps": (0.1, 1, 0.2, 2, 0.3, 4, 0.4, 5)})
    with pytest.raises(UserError, match="needs 5 compiled programs, more than 4"):
        preflight.check(config, tiny.dataset())


def test_a_run_of_everything_compiles_four_programs_before_it_starts(whole):
    assert json.loads((whole / "compiled.json").read_text()) == [0, 0, 0, 0]


def test_the_log_has_what_was_scheduled_and_no_samples_before_there_are_any(whole):
    text = (whole / metrics.FILE).read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["p_x_factor"] for line in lines] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], 0.05 * np.linspace(1, 0.1, 10), rtol=1e-5)
    assert ["log_px_samples" in line for line in lines] == [False, False, *[True] * 8]


def test_stopped_and_killed_in_a_ramp_and_at_a_change_of_program_it_is_the_same_run(whole, tmp_path):
    # At two changes of program, in the ramp, and killed, which goes back to the third change.
    for step in (2, 4, 7, 8):
        with pytest.raises(tiny.Killed if step == 7 else loop.Interrupted):
            tiny.train(tmp_path, tiny.Stop(step, kill=step == 7), **EVERYTHING)
    tiny.train(tmp_path, **EVERYTHING)
    assert not tiny.differing(tiny.restored(tmp_path, **EVERYTHING).tree, tiny.restored(whole, **EVERYTHING).tree)


def test_frozen_statistics_stay(whole):
    state = tiny.restored(whole, **EVERYTHING).tree["state"]
    assert not tiny.differing(state["evaluation_stats"], state["model_state"]["batch_stats"])


@pytest.mark.parametrize("setting", ["learning_rate=linear", "p_x_start=0.1", "num_steps=(0.5,1)"])
def test_a_run_cannot_grow_under_a_schedule(tmp_path, monkeypatch, capsys, setting):
    short = [
        "--config=digits_paper",
        f"--workdir={tmp_path}",
        f"--config.schedule.{setting}",
        "--config.optimizer.decay_epochs=()",
    ]
    monkeypatch.setattr("jem_jax.training.loop.train", lambda *_: (_ for _ in ()).throw(loop.Interrupted(0, 1)))
    assert main([*short, "--config.training.epochs=1"]) == 143
    assert main([*short, "--config.training.epochs=2"]) == 2
    said = capsys.readouterr().err
    assert f"training.epochs is 1 there, 2 here, and schedule.{setting.split('=')[0]} depends on it" in said


def _batch_norm_variables():
    run = setup.prepare(tiny.config(**{"model.factory": "tiny:plain_batch_norm_mlp"}), tiny.dataset())
    state, _ = run.begin()
    moved = jax.tree.map(lambda leaf: leaf + 0.3, state.model_state)
    return run.network, {**moved, "params": state.params}


def test_statistics_are_the_mean_of_the_batches_own():
    network, variables = _batch_norm_variables()
    split = tiny.dataset().train
    found = statistics.estimator(network, split, 43, seed=0)(devices.replicate(variables))
    x = to_float(split.images).reshape(43, -1)
    hidden = x @ variables["params"]["hidden"]["kernel"] + variables["params"]["hidden"]["bias"]
    np.testing.assert_allclose(found["norm"]["mean"], hidden.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["norm"]["var"], np.asarray(hidden).var(axis=0, ddof=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_batches_count_alike_whatever_the_devices(use_devices, monkeypatch, count):
    use_devices(count)
    monkeypatch.setattr(statistics, "_BATCH", 7)
    network, variables = _batch_norm_variables()
    split = tiny.dataset().train
    rows = statistics.prng.host_generator(0, "statistics").permutation(43)[:42].reshape(6, 7)
    means, variances = [], []
    for chosen in rows:
        hidden = to_float(split.images[chosen]).reshape(7, -1) @ variables["params"]["hidden"]["kernel"]
        hidden = np.asarray(hidden + variables["params"]["hidden"]["bias"])
        means.append(hidden.mean(axis=0))
        variances.append(hidden.var(axis=0, ddof=1))
    # On four devices the last round of the six batches has two devices without one.
    found = statistics.estimator(network, split, 43, seed=0)(devices.replicate(variables))
    np.testing.assert_allclose(found["norm"]["mean"], np.mean(means, axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["norm"]["var"], np.mean(variances, axis=0), rtol=1e-5, atol=1e-5)


class _SpectralMLP(nn.Module):
    """Batch norm, and spectral norm, which keeps its vectors in the same collection."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.SpectralNorm(nn.Dense(16, name="hidden"))(x.reshape(len(x), -1), update_stats=train)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name="norm")(x))


def test_only_means_and_variances_are_estimated_anew():
    network, split = Network(_SpectralMLP()), tiny.dataset().train
    variables = network.init(jax.random.key(0), jnp.asarray(to_float(split.images[:8])))
    found = statistics.estimator(network, split, 43, seed=0)(devices.replicate(variables))
    assert not tiny.differing(found["SpectralNorm_0"], variables["batch_stats"]["SpectralNorm_0"])
    assert tiny.differing(found["norm"], variables["batch_stats"]["norm"]) == ["mean", "var"]
    assert np.isfinite(found["norm"]["mean"]).all()


def test_evaluation_uses_the_averaged_parameters_own_statistics(tmp_path):
    config = tiny.config(**{"model.factory": EVERYTHING["model.factory"], "optimizer.ema_decay": 0.9})
    loop.train(config, tiny.dataset(), tmp_path, "tiny", tiny.Stop())
    state = tiny.restored(tmp_path, **EVERYTHING).tree["state"]
    run = setup.prepare(config, tiny.dataset())
    estimate = statistics.estimator(run.network, tiny.dataset().train, 2000, config.seed)
    old = state["model_state"]["batch_stats"]
    of_ema = estimate(devices.replicate({"params": state["ema"], "batch_stats": old}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), of_ema, state["evaluation_stats"])
    of_raw = estimate(
        devices.replicate({"params": state["params"], "batch_stats": state["model_state"]["batch_stats"]})
    )
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (of_ema, of_raw)), strict=True))


def test_a_network_without_statistics_is_left_alone(tmp_path):
    run = setup.prepare(tiny.config(**{"model.factory": "tiny:mlp"}), tiny.dataset())
    state, _ = run.begin()
    assert state.evaluation_stats is None
    assert loop._statistics_estimator(run) is None


def test_the_momentum_of_running_statistics_is_a_setting():
    config = tiny.config(**{"model.norm": "batch", "model.norm_momentum": 0.25, "training.batch_size": 8})
    network = setup.prepare(config, tiny.dataset()).network
    x = jnp.asarray(to_float(tiny.dataset().train.images[:8]))
    variables = network.init(jax.random.key(0), x)
    _, state = network.train_logits(variables, [x], jax.random.key(0))
    once = state["batch_stats"]["norm"]["norm"]["mean"]
    _, state = network.train_logits({**variables, **state}, [x], jax.random.key(0))
    np.testing.assert_allclose(state["batch_stats"]["norm"]["norm"]["mean"], 1.75 * once, rtol=1e-4)
