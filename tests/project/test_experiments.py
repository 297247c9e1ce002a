"""Every script of experiments/ imports what there is and is in the README's table; the queue of work for a GPU."""

import ast
import importlib.util
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

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.rglob("*.py"))


def exists(module: str, name: str) -> bool:
    """Whether `from module import name` works."""
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_imports_exist(path):
    # Read, not run: some scripts need PyTorch or foolbox, and some change the environment.
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    wanted = [(node.module, name.name) for node in nodes for name in node.names if node.module.startswith("jem_jax")]
    assert [pair for pair in wanted if not exists(*pair)] == []


def test_every_command_is_in_the_table():
    table = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    started_by_others = {"jax_worker", "torch_worker"}
    commands = {
        path for path in SCRIPTS if "__main__" in path.read_text("utf-8") and path.stem not in started_by_others
    }
    names = {".".join(path.relative_to(EXPERIMENTS.parent).with_suffix("").parts) for path in commands}
    assert {name for name in names if name not in table and f"{name.rpartition('.')[2]}.py" not in table} == set()


@pytest.mark.parametrize("name", gpu_queue.ENTRIES)
def test_every_entry_of_the_gpu_queue_has_settings_that_exist(name):
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
    subprocess.run([*command, *small], cwd=EXPERIMENTS.parent, env=environment, check=True, timeout=300)
    result = json.loads((tmp_path / "out" / "ten_minutes_tiny.json").read_text())
    assert result["status"] == 0
    assert result["report"]["jem"]["accuracy"] > 0
