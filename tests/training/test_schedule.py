"""Settings that change while a run goes on, and batch statistics re-estimated."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from jem_jax.augment import to_float
from jem_jax.common.errors import UserError
from jem_jax.config import Model
from jem_jax.distributed import devices
from jem_jax.main import main
from jem_jax.runs import metrics, workdir
from jem_jax.training import loop, preflight, schedule, setup, statistics
from jem_jax.training.network import Network, build
from jem_jax.training.schedule import Phase, Program

EVERYTHING = {
    "model.factory": "tiny:plain_batch_norm_mlp",
    "optimizer.sam_rho": 0.1,
    "optimizer.ema_decay": 0.5,
    "sampler.batch_statistics": True,
    "schedule.learning_rate": "linear",
    "schedule.p_x_start": 0.2,
    "schedule.p_x_ramp": 0.5,
    "schedule.sam_start": 0.8,
    "schedule.freeze_norm": 0.8,
    "training.epochs": 2,
    "training.log_every": 1,
}
"""10 iterations: cross-entropy in 0 and 1, p(x) rising in 2 to 6, SAM and frozen batch norm from 8 on"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_steps):
    """A run of everything, without an interruption."""
    directory = tmp_path_factory.mktemp("schedule")
    compiled, iterations = [], []
    trace, iterate = devices.traced, loop._iterate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "traced", lambda *args: compiled.append(len(iterations)) or trace(*args))
        patch.setattr(loop, "_iterate", lambda training: iterations.append(1) or iterate(training))
        tiny.train(directory, **EVERYTHING)
    assert len(iterations) == 10
    assert compiled == [0, 0, 0], "three programs before the first iteration"
    return directory


def test_phases_are_the_shares_of_a_run():
    config = tiny.config(**EVERYTHING | {"schedule.sam_start": 0.5})
    assert schedule.phases(config, 100) == (
        Phase(0, Program(needs_samples=False, num_steps=0, sam=False, frozen=False)),
        Phase(20, Program(needs_samples=True, num_steps=3, sam=False, frozen=False)),
        Phase(50, Program(needs_samples=True, num_steps=3, sam=True, frozen=False)),
        Phase(80, Program(needs_samples=True, num_steps=3, sam=True, frozen=True)),
    )


def test_chain_steps_follow_their_pairs_of_which_there_are_few():
    config = tiny.config(**{"schedule.num_steps": (0.0, 1, 0.25, 2, 0.5, 5)})
    found = [(phase.first, phase.program.num_steps) for phase in schedule.phases(config, 100)]
    assert found == [(0, 1), (25, 2), (50, 5)]
    many = tiny.config(**{"schedule.num_steps": (0.1, 1, 0.2, 2, 0.3, 4, 0.4, 5)})
    with pytest.raises(UserError, match="needs 5 compiled programs, more than 4"):
        preflight.check(many, tiny.dataset())


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


def test_the_log_has_what_was_scheduled_and_no_samples_before_there_are_any(whole):
    text = (whole / metrics.FILE).read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines() if '"loss"' in line]
    assert [line["p_x_factor"] for line in lines] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    np.testing.assert_allclose([line["learning_rate"] for line in lines], 0.05 * np.linspace(1, 0.1, 10), rtol=1e-5)
    assert ["log_px_samples" in line for line in lines] == [False, False, *[True] * 8]
    for line in lines[2:]:
        contrast = line["log_px_samples"] - line["log_px_data"]
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["p_x_factor"] * contrast, rel=1e-4)


def test_killed_in_a_ramp_and_stopped_at_a_change_of_program_it_is_the_same_run(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    # What a run that was killed has left: its checkpoint amid the ramp.
    shutil.rmtree(copy / workdir.CHECKPOINTS / "10")
    stop = tiny.Stop(8)
    with pytest.raises(loop.Interrupted):
        tiny.train(copy, stop, **EVERYTHING)
    assert stop.asked == [6, 7, 8]
    before = tiny.restored(copy, **EVERYTHING).tree["state"]
    tiny.train(copy, **EVERYTHING)
    ours, theirs = (tiny.restored(directory, **EVERYTHING).tree for directory in (copy, whole))
    assert not tiny.differing(ours, theirs)
    # Statistics are frozen as they are re-estimated then, and stay.
    frozen = ours["state"]["model_state"]["batch_stats"]
    assert not tiny.differing(ours["state"]["evaluation_stats"], frozen)
    assert _close(_estimated(before), frozen)


@pytest.mark.parametrize("setting", ["learning_rate=linear", "num_steps=(0.5,1)"])
def test_a_run_cannot_grow_under_a_schedule(tmp_path, monkeypatch, capsys, setting):
    short = ["--config=digits_paper", f"--workdir={tmp_path}", "--config.optimizer.decay_epochs=()"]
    short.append(f"--config.schedule.{setting}")
    monkeypatch.setattr("jem_jax.training.loop.train", lambda *_: (_ for _ in ()).throw(loop.Interrupted(0, 1)))
    assert main([*short, "--config.training.epochs=1"]) == 143
    assert main([*short, "--config.training.epochs=2"]) == 2
    said = capsys.readouterr().err
    assert f"training.epochs is 1 there, 2 here, and schedule.{setting.split('=')[0]} depends on it" in said


@pytest.mark.parametrize("count", [1, 4])
def test_statistics_are_the_mean_of_the_batches_own_whatever_the_devices(use_devices, monkeypatch, count):
    use_devices(count)
    monkeypatch.setattr(statistics, "_BATCH", 7)
    run = setup.prepare(tiny.config(**{"model.factory": "tiny:plain_batch_norm_mlp"}), tiny.dataset())
    state, split = run.begin()[0], run.dataset.train
    variables = {**jax.tree.map(lambda leaf: leaf + 0.3, state.model_state), "params": state.params}
    # On four devices the last round of six batches has two devices without one.
    rows = statistics.prng.host_generator(0, "statistics").permutation(43)[:42].reshape(6, 7)
    hidden = variables["params"]["hidden"]
    seen = to_float(split.images).reshape(43, -1) @ np.array(hidden["kernel"]) + np.array(hidden["bias"])
    found = statistics.estimator(run.network, split, 43, seed=0)(devices.replicate(variables))
    expected = {"mean": seen[rows].mean(axis=1), "var": seen[rows].var(axis=1, ddof=1)}
    for name, of_batches in expected.items():
        np.testing.assert_allclose(found["norm"][name], of_batches.mean(axis=0), rtol=1e-5, atol=1e-5)


KEY = jax.random.key(0)


class _SpectralMLP(nn.Module):
    """Batch norm, and spectral norm, which keeps its vectors in the same collection."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.SpectralNorm(nn.Dense(16, name="hidden"))(x.reshape(len(x), -1), update_stats=train)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name="norm")(x))


def test_only_means_and_variances_are_estimated_anew():
    network, split = Network(_SpectralMLP()), tiny.dataset().train
    variables = jax.jit(network.init)(jax.random.key(0), to_float(split.images[:8]))
    found = statistics.estimator(network, split, 43, seed=0)(devices.replicate(variables))
    assert not tiny.differing(found["SpectralNorm_0"], variables["batch_stats"]["SpectralNorm_0"])
    assert tiny.differing(found["norm"], variables["batch_stats"]["norm"]) == ["mean", "var"]
    assert np.isfinite(found["norm"]["mean"]).all()


def _estimated(state, name="params"):
    """Batch statistics re-estimated for the parameters of a restored state, or for their averages."""
    run = setup.prepare(tiny.config(**EVERYTHING), tiny.dataset())
    estimate = statistics.estimator(run.network, tiny.dataset().train, 2000, run.config.seed)
    return estimate(devices.replicate({"params": state[name], "batch_stats": state["model_state"]["batch_stats"]}))


def _close(ours, theirs):
    return all(
        np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)
    )


def test_evaluation_uses_the_averaged_parameters_own_statistics(whole):
    state = tiny.restored(whole, step=5, **EVERYTHING).tree["state"]
    assert _close(_estimated(state, "ema"), state["evaluation_stats"])
    assert not _close(_estimated(state), state["evaluation_stats"])


def test_the_momentum_of_running_statistics_is_a_setting():
    network = build(Model(norm="batch", norm_momentum=0.25), tiny.CLASSES)
    x = to_float(tiny.dataset().train.images[:8])
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), jax.eval_shape(network.init, KEY, x))

    def again(state, _):
        _, state = network.train_pass({**variables, **state}, x, KEY)
        return state, state["batch_stats"]["norm"]["norm"]["mean"]

    start = {"batch_stats": jax.tree.map(np.zeros_like, variables["batch_stats"])}
    _, (once, twice) = jax.jit(lambda: jax.lax.scan(again, start, length=2))()
    np.testing.assert_allclose(twice, 1.75 * once, rtol=1e-4)
