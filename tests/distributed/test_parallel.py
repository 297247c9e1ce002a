"""How many devices a CPU is made into, and what is cut over devices comes back whole."""

import os
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jem_jax.commands import modes
from jem_jax.common.errors import UserError
from jem_jax.distributed import devices, processes
from jem_jax.distributed.processes import Cluster
from jem_jax.main import main
from jem_jax.runs.workdir import RunFacts


@pytest.fixture
def cores(monkeypatch):
    """Makes the process believe in so many usable cores."""
    return lambda count: monkeypatch.setattr(devices, "_usable_cores", lambda: count)


@pytest.mark.parametrize(
    ("count", "sizes", "num_processes", "chosen"),
    [
        (1, (64, 2000), 1, 1),
        (3, (64, 2000), 1, 2),
        (64, (64, 2000), 1, 4),  # more devices than four were not found to help
        (4, (62, 2000), 1, 2),
        (4, (64, 2002), 1, 2),
        (4, (63, 2000), 1, 1),
        (4, (64, 0), 1, 4),  # a classifier has no buffer to cut
        # Several processes divide the sizes among all their devices.
        (4, (64, 2000), 4, 4),
        (4, (8, 2000), 4, 2),
        (4, (4, 2000), 4, 1),
    ],
)
def test_a_cpu_is_the_most_devices_that_cores_batch_and_buffer_allow(cores, count, sizes, num_processes, chosen):
    cores(count)
    assert devices.choose_cpu_devices(sizes, num_processes=num_processes) == chosen


@pytest.mark.parametrize(
    ("quota", "usable"), [("150000 100000", 1), ("200000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("", 3)]
)
def test_a_cgroups_quota_limits_the_usable_cores(monkeypatch, quota, usable):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    monkeypatch.setattr(devices.Path, "read_text", lambda _: quota)
    assert devices._usable_cores() == usable


def test_a_run_keeps_its_devices_unless_others_are_asked_for(cores, tiny_config, tiny_dataset):
    cores(4)
    known = RunFacts(tiny_config(), (8, 8, 1), ("a", "b", "c"), cpu_devices=2)
    wish = tiny_config(**{"training.cpu_devices": 1})
    assert modes._cpu_devices(tiny_config(), tiny_dataset, None, Cluster()) == 4
    assert modes._cpu_devices(tiny_config(), tiny_dataset, known, Cluster()) == 2
    assert modes._cpu_devices(wish, tiny_dataset, known, Cluster()) == 1


@pytest.mark.parametrize(
    ("shape", "flat"), [((32, 32, 3), (24, 128)), ((1, 16, 16, 1), (2, 128)), ((28, 28, 1), (784,)), ((8, 8, 1), (64,))]
)
def test_images_lie_as_whole_rows_of_lanes_where_they_fill_them(shape, flat):
    buffer = np.arange(8 * np.prod(shape), dtype=np.float32).reshape(8, *shape)
    assert devices.flat(shape) == flat
    rows = devices.shard_buffer(buffer)
    assert rows.shape == (4, 2, *flat)
    np.testing.assert_array_equal(devices.whole_buffer(rows, shape), buffer[:, None])


def test_devices_of_all_processes_stand_process_by_process(monkeypatch):
    # As on a v5e:4x4, whose first host has the devices 0, 1, 4 and 5.
    own, others = jax.devices()[:2], jax.devices()[2:]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda process_index=1: (others, own)[process_index])
    assert list(devices._mesh_of_all().devices) == [*others, *own]


def test_what_is_cut_by_device_is_whole_again_and_rows_are_cut_as_gathered_ones():
    array = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    parts = devices.shard(array)
    assert parts.shape == (4, 4, 3)
    assert all(shard.data.shape == (1, 4, 3) for shard in parts.addressable_shards)
    np.testing.assert_array_equal(devices.whole(parts), array)
    rows = np.random.default_rng(0).permutation(16)[:8]
    np.testing.assert_array_equal(devices.shard_rows(array, rows), devices.shard(array[rows]))


@pytest.mark.parametrize(("total", "batch_size"), [(1, 8), (7, 1), (9, 8), (30, 100)])
def test_examples_come_back_in_order_whatever_the_batches(total, batch_size):
    double = devices.over_examples(lambda factor, examples: {"y": factor * examples["x"]})
    x = np.arange(total * 2, dtype=np.float32).reshape(total, 2)
    np.testing.assert_array_equal(double(np.float32(2), {"x": x}, batch_size)["y"], 2 * x)


def test_a_last_batch_and_fewer_examples_need_no_program_of_their_own():
    traced = []
    total_of = devices.over_examples(lambda _, pair: traced.append(pair[0].shape) or pair[0] + pair[1])
    for total in (30, 5):
        x = np.arange(total * 2, dtype=np.float32).reshape(total, 2)
        np.testing.assert_array_equal(total_of(None, (x, x), 8, fill=8), 2 * x)
    assert traced == [(8 // jax.device_count(), 2)]


def test_compiler_options_that_xla_does_not_know_or_its_user_sets_are_left_out(monkeypatch):
    # XLA renames and removes them from one version to the next.
    level = {"xla_backend_optimization_level": 1}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert devices._on_cpu(**level, xla_no_such_option=True) == level
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert devices._on_cpu(**level) == {}


@pytest.mark.parametrize(("total", "batch_size"), [(10, 4), (3, 1)])
def test_examples_that_pass_together_are_different_ones_on_every_device(total, batch_size):
    """Each example's row says who was in its batch."""
    everyone = devices.over_examples(lambda _, x: jnp.zeros((len(x), total)).at[:, x].add(1), together=True)
    found = everyone(None, np.arange(total), batch_size)
    assert found.max() == 1
    assert (found.sum(axis=1) == min(batch_size, total)).all()
    assert (np.diagonal(found) == 1).all()


@pytest.mark.parametrize(
    ("count", "error", "said"),
    [
        (1, MemoryError(), r"the memory did not suffice \(MemoryError\); lower config\.training\.batch_size or "),
        (1, ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), r"allocating 9 bytes\.\); low"),
        (2, ValueError("UNKNOWN: Gloo all-reduce failed"), "another process ended or could not be reached .*Gloo"),
        (2, jax.errors.JaxRuntimeError("closed"), r"another process ended or could not be reached \(closed\)"),
        (1, ValueError("UNKNOWN: anything"), None),
        (2, ValueError("a fault of ours"), None),
        (2, UserError("DATA_LOSS: as somebody named a file"), None),
    ],
)
def test_what_an_error_of_the_runtime_means_for_a_run(monkeypatch, count, error, said):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    found = processes.explain_runtime_error(error)
    if said is None:
        assert found is None
    else:
        assert re.search(said, found)
        assert "\n" not in found


def test_an_allocation_that_fails_ends_a_run_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(modes, "_in_workdir", Mock(side_effect=MemoryError))
    assert main(["--config=digits", f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the memory did not suffice" in line
