"""Checkpoints: what is read back is what was written, or it is not used."""

import errno
import os
import shutil
import threading
import time
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jem_jax.common.errors import UserError
from jem_jax.distributed import devices
from jem_jax.runs import checkpoint
from jem_jax.runs.checkpoint import Checkpoints

MANIFEST = "manifest.json"


def _state(scale=1.0):
    """A state with everything that is hard to keep."""
    random = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(scale * random.normal(size=(3, 4)), jnp.float32),
        "half": jnp.asarray(scale * random.normal(size=5), jnp.bfloat16),
        "odd": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-42], jnp.float32),
    }
    moments = optax.chain(optax.identity(), optax.scale_by_adam()).init(params)
    state = {"step": jnp.int32(7), "params": params, "model_state": {}, "opt_state": moments, "ema": None}
    return state | {"key": jax.random.key(3)}


def _write(directory, *numbers, keep=5, tree=None):
    checkpoints = Checkpoints(directory, keep)
    for number in numbers:
        checkpoints.save(number, tree or checkpoint.to_tree(_state(number)), {"number": number})
    checkpoints.close()


def _read(directory, step=None):
    found = checkpoint.restore(directory, checkpoint.template_of(_state()), step)
    return found, checkpoint.from_tree(jax.eval_shape(_state), found.tree)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of checkpoints 1, 2 and 3; tests work in copies."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    _write(directory, 1, 2, 3)
    return directory


@pytest.fixture
def copy(three, tmp_path):
    return shutil.copytree(three, tmp_path / "checkpoints")


def _flip(file, place):
    """Changes one byte of a file, or gives an empty one its first."""
    content = bytearray(file.read_bytes() or b"x")
    content[place] ^= 1
    file.write_bytes(content)


def test_a_state_is_read_back_bit_for_bit(tmp_path):
    state = _state()
    _write(tmp_path, 7, tree=checkpoint.to_tree(state))
    found, back = _read(tmp_path)
    assert (found.step, found.note) == (7, {"number": 7})
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert not tiny.differing(back, state)
    assert (back["ema"], back["model_state"]) == (None, {})
    assert back["params"]["half"].dtype == jnp.bfloat16
    assert jax.dtypes.issubdtype(back["key"].dtype, jax.dtypes.prng_key)
    assert np.array_equal(jax.random.uniform(back["key"], (3,)), jax.random.uniform(state["key"], (3,)))


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    chains = np.random.default_rng(0).normal(size=(4096, 1, 8, 8, 1)).astype(np.float32)
    buffer = devices.shard_buffer(chains)
    overwrite = jax.jit(lambda buffer: buffer * 0, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    whole = devices.whole_buffer(buffer, (8, 8, 1))
    checkpoints.save(1, {"buffer": whole}, {})
    jax.block_until_ready((overwrite(buffer), overwrite(whole)))
    assert buffer.is_deleted()  # the other only where nothing reads it any more
    checkpoints.close()
    found = checkpoint.restore(tmp_path, {"buffer": jax.ShapeDtypeStruct(chains.shape, chains.dtype)})
    assert not tiny.differing(found.tree["buffer"], chains)


def test_a_later_program_goes_on_saves_no_step_twice_and_keeps_the_last_so_many(copy):
    _write(copy, 3, tree=checkpoint.to_tree(_state(100)))
    assert not tiny.differing(_read(copy)[1]["params"], _state(3)["params"])
    _write(copy, 4, 10, keep=2)
    assert checkpoint.steps(copy) == [4, 10]
    assert not checkpoint.unfinished(copy)
    assert _read(copy)[0].note == {"number": 10}


def test_what_replaces_stands_alone(copy):
    for number in (3, 2):
        checkpoints = Checkpoints(copy, keep=5)
        checkpoints.replace(number, checkpoint.to_tree(_state(9)), {"number": 10 + number})
        checkpoints.close()
        assert checkpoint.steps(copy) == [number]
        assert _read(copy)[0].note == {"number": 10 + number}


def test_a_checkpoint_that_tells_of_another_is_whole_after_it(tmp_path, monkeypatch):
    written, write = [], checkpoint._write_manifest

    def slow(path, is_regular):
        time.sleep(0.3 if path.parent.name == "best" else 0)
        write(path, is_regular)
        written.append(path.parent.name)

    monkeypatch.setattr(checkpoint, "_write_manifest", slow)
    best = Checkpoints(tmp_path / "best", keep=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, after=best)
    for one in (best, checkpoints):
        one.save(1, checkpoint.to_tree(_state()), {})
    checkpoints.close()
    best.close()
    assert written == ["best", "checkpoints"]


def test_it_does_not_wait_for_one_of_the_other_that_was_begun_after_it(tmp_path, monkeypatch):
    written, write = [], checkpoint._write_manifest
    later_began, first_is_whole = threading.Event(), threading.Event()

    def in_turn(path, is_regular):
        if path == tmp_path / "best" / "2":
            later_began.set()
            assert first_is_whole.wait(30)
        write(path, is_regular)
        written.append(f"{path.parent.name} {path.name}")
        if path.parent.name == "checkpoints":
            first_is_whole.set()

    monkeypatch.setattr(checkpoint, "_write_manifest", in_turn)
    best = Checkpoints(tmp_path / "best", keep=2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, after=best)
    # Its arrays take until the other's next checkpoint is in the making.
    wait = checkpoints._manager.wait_until_finished

    def slow():
        if threading.current_thread() is not threading.main_thread():  # where Orbax waits for the save before
            later_began.wait(30)
        wait()

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", slow)
    for one, step in ((best, 1), (checkpoints, 1), (best, 2)):
        one.save(step, checkpoint.to_tree(_state()), {})
    assert first_is_whole.wait(30)
    monkeypatch.undo()
    checkpoints.close()
    best.close()
    assert written == ["best 1", "checkpoints 1", "best 2"]


def test_a_change_is_noticed_wherever_it_is(copy):
    path = copy / "3"
    assert checkpoint.damage(path) is None
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            _flip(file, place)
            fault = checkpoint.damage(path)
            assert fault is not None, f"{file}, byte {place}"
            assert file.name == MANIFEST or str(file.relative_to(path)) in fault
            with pytest.raises(UserError, match=r"checkpoint .*/3 is damaged"):
                _read(copy)
            file.write_bytes(content)
    _read(copy)
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    assert f"{largest.relative_to(path)} is not what was written" in checkpoint.damage(path)
    largest.unlink()
    assert f"{largest.relative_to(path)} is missing" in checkpoint.damage(path)
    assert checkpoint.newest_whole(copy)[0] == 2


def test_a_file_that_the_disk_does_not_give_back_is_damage(copy, monkeypatch):
    monkeypatch.setattr(checkpoint.files, "sha256", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    assert "its files cannot be read (Input/output error)" in (checkpoint.damage(copy / "3") or "")


def test_which_were_due_is_kept_with_them(tmp_path):
    checkpoints = Checkpoints(tmp_path, 5)
    for number, is_regular in ((1, True), (2, False), (3, True)):
        checkpoints.save(number, {"x": np.zeros(2)}, {}, is_regular)
    checkpoints.close()
    assert checkpoint.regular(tmp_path) == {1, 3}
    (tmp_path / "3" / MANIFEST).write_text("{}")
    assert checkpoint.regular(tmp_path) == {1}


def test_the_newest_whole_one_is_found_behind_unfinished_and_damaged_ones(copy):
    (copy / "3" / MANIFEST).unlink()
    assert (checkpoint.steps(copy), checkpoint.unfinished(copy)) == ([1, 2], [copy / "3"])
    assert checkpoint.newest_whole(copy) == (2, {copy / "3": "it was never finished"})
    assert _read(copy)[0].step == 2
    _flip(copy / "2" / "note" / "metadata", 0)
    step, faults = checkpoint.newest_whole(copy)
    assert (step, faults.keys()) == (1, {copy / "2", copy / "3"})
    assert "note/metadata is not what was written" in faults[copy / "2"]
    assert not tiny.differing(_read(copy, step)[1]["params"], _state(1)["params"])
    # Where none is left, they stay where they are.
    (copy / "1" / MANIFEST).write_text("{}")
    before = sorted(copy.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoint .*/2 is damaged .*no whole one is left.*--overwrite"):
        checkpoint.newest_whole(copy)
    assert sorted(copy.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, checkpoint.to_tree(_state()), {})
    checkpoints.finish()
    monkeypatch.setattr(
        checkpoint, "_write_manifest", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    checkpoints.save(2, checkpoint.to_tree(_state()), {})
    with pytest.raises(UserError, match=r"no checkpoint could be written to .*no space left.*earlier ones are kept"):
        checkpoints.close()
    assert checkpoint.newest_whole(tmp_path)[0] == 1


def test_a_folder_in_which_saves_would_be_lost_is_refused(tmp_path):
    for name in ("a[1]b", "a\\b"):
        with pytest.raises(UserError, match=r"no checkpoint can be saved or .* below .*; use a workdir without them"):
            checkpoint.check_folder(tmp_path / name / "run")
    with pytest.raises(UserError, match="backslash"):
        checkpoint.restore(tmp_path / "a\\b" / "checkpoints", {})


@pytest.mark.parametrize("name", ["a?b*", "[b", "a#b%20", "a'b\"c$&;", "ü\n猫"])
def test_odd_names_of_folders_hold_checkpoints(tmp_path, name):
    checkpoint.check_folder(tmp_path / name)
    _write(tmp_path / name, 3, tree={"x": np.ones(2)})
    found = checkpoint.restore(tmp_path / name, {"x": jax.ShapeDtypeStruct((2,), np.float64)})
    assert found.tree["x"].tolist() == [1, 1]
