"""What counts as diverged: each fault is named and fires in time, health never does, and devices decide alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jem_jax.training import divergence, recovery
from jem_jax.training.divergence import Limits

LIMITS = Limits(max_gap=100.0, max_rms=3.0, patience=4)
HEALTHY = {
    "accuracy": 0.9, "log_px_data": -1.0, "log_px_samples": -3.0, "samples_spread": 0.9, "samples_rms": 0.8,
    "data_rms": 0.7,
}  # fmt: skip
FAULTS = {
    "gap": {"log_px_samples": -150.0},
    "collapse": {"samples_spread": 0.01},
    "saturation": {"samples_rms": 3.5},
}


def _watch(seen, not_finite=(), runaway=()):
    """The watch after iterations whose metrics are `seen`."""
    undone = np.array([[step in which for which in (not_finite, runaway)] for step in range(len(seen))])
    metrics = {name: np.float32([one[name] for one in seen]) for name in seen[0]}

    def body(watch, iteration):
        step, undone, metrics = iteration
        return divergence.watched(watch, step, *undone, metrics, LIMITS), None

    steps = np.arange(len(seen), dtype=np.int32)
    return jax.lax.scan(body, divergence.initial_watch(), (steps, undone, metrics))[0]


def _alarm(*args, **settings):
    return divergence.alarm(_watch(*args, **settings))


def _alarm_of(accuracies):
    """The alarm after iterations that are healthy but for these training accuracies."""
    return _alarm([HEALTHY | {"accuracy": accuracy} for accuracy in accuracies])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_slow_fault_is_named_once_it_has_lasted(fault):
    ill = HEALTHY | FAULTS[fault]
    before = [HEALTHY] * 2 + [ill] * (LIMITS.patience - 1)
    assert _alarm(before) is None
    assert _alarm([*before, HEALTHY, *before]) is None
    assert _alarm([*before, ill, HEALTHY]) == divergence.Alarm(fault, step=5)


def test_the_other_factorisations_gap_counts_too():
    metrics = {"accuracy": 0.9, "contrast_xy": -150.0, "samples_spread": 1.0, "samples_rms": 1.0, "data_rms": 1.0}
    assert _alarm([metrics] * LIMITS.patience).reason == "gap"


@pytest.mark.parametrize("seen", [{}, {"samples_rms": 3.5, "data_rms": 3.5}], ids=["healthy", "black and white alone"])
def test_no_alarm_is_raised(seen):
    assert _alarm([HEALTHY | seen] * (3 * LIMITS.patience)) is None


@pytest.mark.parametrize("name", ["log_px_samples", "samples_spread", "samples_rms"])
def test_a_measure_that_is_not_a_number_is_a_fault(name):
    assert _alarm([HEALTHY | {name: np.nan}] * LIMITS.patience) is not None


@pytest.mark.parametrize(("before", "after"), [(0.95, 0.2), (0.6, 0.01)])
def test_a_classifier_that_forgot_is_noticed_before_a_checkpoint_counts_as_good(before, after):
    alarm = _alarm_of([before] * 300 + [after] * recovery.MIN_AGE)
    assert alarm.reason == "forgotten"
    assert alarm.step >= 300


@pytest.mark.parametrize(("batch", "accuracy"), [(4, 0.1), (4, 0.6), (16, 0.9)])
def test_noise_of_small_batches_is_no_forgetting(batch, accuracy):
    assert _alarm_of(np.random.default_rng(0).binomial(batch, accuracy, 20_000) / batch) is None


def test_a_classifier_that_falls_by_a_third_has_not_forgotten():
    assert _alarm_of([0.9] * 300 + [0.6] * 300) is None


def test_a_classifier_is_not_watched_for_faults_of_samples():
    plain = [{"loss": 1.0, "accuracy": 0.9}] * (2 * LIMITS.patience)
    assert divergence.measures(None) == {}
    assert _alarm(plain) is None
    assert _alarm(plain, not_finite=(3,)) == divergence.Alarm("not_finite", step=3)


def test_the_first_alarm_stays():
    ill = HEALTHY | FAULTS["gap"]
    assert _alarm([HEALTHY, *[ill] * 8], runaway=(1,), not_finite=(6,)) == divergence.Alarm("log_density", 1)


def test_an_iteration_that_is_undone_neither_counts_nor_ends_a_count():
    ill = HEALTHY | FAULTS["gap"]
    counts = _watch([ill, ill, HEALTHY], not_finite=(2,)).counts
    assert counts.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_a_single_number_that_is_not_finite_is_seen(number):
    finite, tree = np.zeros((3, 2), np.float32), {"b": np.array([0, number, 0], np.float32)}
    assert divergence.finite(finite)
    assert divergence.health(tree, jnp.float32(0), 1e6, None).not_finite == 1
    assert divergence.health(finite, jnp.float32(number), 1e6, None).not_finite == 1


def test_measures_are_those_of_the_whole_batch_however_it_is_divided():
    random = np.random.default_rng(0)
    data, samples = (random.normal(loc, size, (8, 4, 4, 1)).astype(np.float32) for loc, size in ((0, 1), (1, 0.5)))
    expected = {
        "samples_spread": np.sqrt(samples.var(axis=0).mean() / data.var(axis=0).mean()),
        "samples_rms": np.sqrt(np.mean(samples**2)),
        "data_rms": np.sqrt(np.mean(data**2)),
    }
    for devices in (1, 4):
        parts = [divergence.moments(d, [s]) for d, s in zip(
            np.split(data, devices), np.split(samples, devices), strict=True)]  # fmt: skip
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *parts)
        assert divergence.measures(mean) == pytest.approx(expected, rel=1e-5)


def test_samples_that_are_all_alike_have_no_spread():
    data = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 1)), jnp.float32)
    alike = divergence.measures(divergence.moments(data, [jnp.full_like(data, 0.5)]))
    assert alike["samples_spread"] == pytest.approx(0, abs=1e-3)
    single = divergence.measures(divergence.moments(data[:1], [data[:1]]))
    assert single["samples_spread"] == 1
