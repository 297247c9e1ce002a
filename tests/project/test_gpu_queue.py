"""The queue of work for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import HELPERS

from experiments import gpu_queue
from jem_jax.commands import config_files

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", gpu_queue.ENTRIES)
def test_every_entry_has_settings_that_exist(name):
    entry = gpu_queue.ENTRIES[name]
    config_files.read(entry.config, [tuple(setting.split("=", 1)) for setting in entry.settings])
    assert entry.limit <= 600


def test_parts_of_the_data_set_are_joined_and_kept(tmp_path):
    images, labels = np.arange(10, dtype=np.uint8).reshape(5, 2, 1, 1), np.arange(5)
    np.savez(tmp_path / "1.npz", images=images[:3], labels=labels[:3])
    np.savez(tmp_path / "2.npz", images=images[3:], labels=labels[3:], test_images=images[:1], test_labels=labels[:1])
    kept = tmp_path / "kept"
    assert gpu_queue._joined(kept, None) is None
    assert len(np.load(gpu_queue._joined(kept, tmp_path / "1.npz"))["images"]) == 3
    joined = np.load(gpu_queue._joined(kept, tmp_path / "2.npz"))
    assert np.array_equal(joined["images"], images)
    assert np.array_equal(joined["labels"], labels)
    assert np.array_equal(joined["test_images"], images[:1])
    assert np.array_equal(np.load(gpu_queue._joined(kept, None))["images"], images)


@pytest.mark.slow
def test_an_entry_can_be_rehearsed_on_a_cpu(tmp_path):
    command = [sys.executable, "experiments/gpu_queue.py", "--rehearse", f"--runs={tmp_path}", f"--out={tmp_path}/out"]
    # A network that compiles in a third of the time; it has batch norm to freeze.
    small = ("--set=model.factory=tiny:plain_batch_norm_mlp", "ten_minutes")
    environment = {**os.environ, "PYTHONPATH": HELPERS}
    subprocess.run([*command, *small], cwd=ROOT, env=environment, check=True, timeout=300)
    result = json.loads((tmp_path / "out" / "ten_minutes_tiny.json").read_text())
    assert result["status"] == 0
    assert result["report"]["jem"]["accuracy"] > 0
