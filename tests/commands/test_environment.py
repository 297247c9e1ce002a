"""Whatever the environment and other code in the process say, a run is the same run."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
import tiny
from command import SHORTEST, TINY, Command, finished_run, metrics, restored

import jem_jax
from jem_jax import energy, replay_buffer, sgld
from jem_jax.common.errors import UserError
from jem_jax.distributed import devices, processes
from jem_jax.main import main

FLAGS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 3,
    "jax_disable_jit": True,
    "jax_no_tracing": True,
    "jax_no_execution": True,
    "jax_array_garbage_collection_guard": "fatal",
    "jax_error_checking_behavior_nan": "raise",
}


def _assert_same(run: Path) -> None:
    assert tiny.differing(restored(run).tree, restored(finished_run()).tree) == []
    assert metrics(run) == metrics(finished_run())


@pytest.mark.slow
def test_jax_variables_change_nothing(tmp_path):
    variables = {name.upper(): "1" if value is True else str(value) for name, value in FLAGS.items()}
    status, _, errors = Command(*TINY, cwd=tmp_path, **variables).wait()
    assert (status, errors) == (0, "")
    _assert_same(tmp_path / "runs" / "digits")


def test_jax_settings_are_given_back():
    before = {name: getattr(jax.config, name) for name in FLAGS}
    for name, value in FLAGS.items():
        jax.config.update(name, value)
    try:
        with processes.own_settings():
            assert jax.random.key_data(jax.random.key(0)).tolist() == [0, 0]
            assert jax.numpy.arange(3).dtype == np.int32
        assert {name: getattr(jax.config, name) for name in FLAGS} == FLAGS
        assert jem_jax.load(finished_run()).buffer.dtype == np.float32
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_jax_contexts_of_the_caller_change_nothing():
    before = jax.config.values
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.default_prng_impl("rbg"), jax.disable_jit(True):
        with processes.own_settings():
            traced = jax.jit(lambda x: x + np.arange(2, dtype=np.int32))
            assert traced(jax.numpy.ones((2, 2))).dtype == np.float32
            assert "jit" in str(jax.make_jaxpr(traced)(1.0))
            assert jax.random.key_data(jax.random.key(0)).tolist() == [0, 0]
        assert jax.numpy.arange(3).dtype == np.int64
    assert jax.config.values == before


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FLAX_PROFILE", "maybe", "JAX cannot start: invalid truth value 'maybe' for environment 'FLAX_PROFILE'; corr"),
        ("XLA_FLAGS", "--xla_nonsense=1", "XLA cannot start: Unknown flag in XLA_FLAGS: --xla_nonsense=1; correct"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=abc", "XLA cannot start: Couldn't interpret value abc f"),
    ],
)
def test_a_wrong_jax_variable_is_said_in_a_line(tmp_path, variable, value, said):
    status, output, errors = Command(*TINY, cwd=tmp_path, **{variable: value}).wait()
    assert (status, output) == (2, "")
    assert errors.startswith(f"jem-jax: {said}")
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_device_at_all_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "0")
    assert main([*TINY, f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err == "jem-jax: JAX_NUM_CPU_DEVICES must be at least 1, not 0\n"
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_is_said_before_jax_is_imported():
    script = (
        "import sys\nfrom jem_jax.main import main\n"
        "assert main(['--config=digits', '--config.model.dept=3']) == 2\n"
        "print([name for name in ('jax', 'flax', 'optax', 'matplotlib') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
    assert "did you mean config.model.depth?" in ended.stderr


def test_a_run_takes_what_divides_of_the_devices_and_leaves_the_callers_state_alone(tmp_path, monkeypatch):
    loggers = [logging.getLogger(name) for name in ("", "absl", "jax", "matplotlib")]
    state = lambda: (  # noqa: E731
        random.getstate(), np.random.get_state()[1].tolist(), os.getcwd(), dict(os.environ), dict(matplotlib.rcParams),
        np.geterr(), list(warnings.filters), sys.path[:], [(log.level, log.handlers[:]) for log in loggers],
        [signal.getsignal(number) for number in signal.valid_signals()], devices.count(),
    )  # fmt: skip
    assert main(["--config=digits", "--mode=evaluate", f"--workdir={tmp_path}"]) == 2
    monkeypatch.setattr(devices, "set_by_environment", lambda: False)
    monkeypatch.setattr(devices, "_usable_cores", lambda: 4)
    before = state()
    assert main([*SHORTEST, f"--workdir={tmp_path / 'run'}", "--config.training.batch_size=18"]) == 0
    assert [a == b for a, b in zip(state(), before, strict=True)] == [True] * len(before)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["cpu_devices"] == 2
    assert devices.count() == jax.device_count() == 4
    assert np.isfinite(restored(tmp_path / "run").tree["buffer"]).all()


def test_fewer_devices_than_were_wanted_are_taken_as_far_as_they_divide(monkeypatch):
    monkeypatch.setattr(devices, "set_by_environment", lambda: False)
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with processes.own_settings():
        processes.start(processes.Cluster(), 4, 1)
        assert devices.count() == 2


def test_a_thread_may_train_and_overwrite_a_run_of_other_settings(run):
    settings, statuses = run / "run.json", []
    before = settings.read_text()
    assert '"seed": 0' in before
    settings.write_text(before.replace('"seed": 0', '"seed": 1'))
    (run / "metrics.jsonl").write_text('{"step": 19}\n')
    arguments = [*SHORTEST, f"--workdir={run}", "--overwrite"]
    thread = threading.Thread(target=lambda: statuses.append(main(arguments)))
    thread.start()
    thread.join()
    assert statuses == [0]
    assert '"seed": 0' in settings.read_text()
    _assert_same(run)


def test_a_loaded_model_fits_the_library_and_refuses_other_images(caplog):
    logits, buffer, config = jem_jax.load(finished_run())
    assert isinstance(buffer, jax.Array)

    @jax.jit
    def sample(key, buffer):
        start = replay_buffer.draw(key, buffer, buffer[:4, 0], reinit_prob=0.5)
        keys = jax.random.split(key, 4)
        x = sgld.chain(keys, energy.marginal(logits), start.x, num_steps=2, step_size=0.1, noise_std=0.01)
        return replay_buffer.write(buffer, start.slots, x)

    assert sample(jax.random.key(0), buffer).shape == buffer.shape
    assert logits(np.zeros((0, 8, 8, 1))).shape == (0, 10)
    assert logits(np.zeros((2, 8, 8, 1))).dtype == np.float32
    assert config.sampler.num_steps == 2
    assert [record.getMessage() for record in caplog.records] == []
    for images in (np.zeros((2, 8, 8, 1), np.uint8), np.zeros((8, 8, 1)), np.zeros((2, 8, 8, 3))):
        with pytest.raises(UserError, match=r"logits takes floats \[B, 8, 8, 1\] in \[-1, 1\], not "):
            logits(images)
