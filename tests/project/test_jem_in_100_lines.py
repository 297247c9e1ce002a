"""The whole JEM in a hundred lines is that: short, on five modules alone, and it learns."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

SCRIPT = Path(__file__).parents[2] / "experiments" / "jem_in_100_lines.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")


def test_at_most_100_lines_on_five_modules():
    assert len(SOURCE.splitlines()) <= 100
    imported = {
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jem_jax")
        for name in node.names
    }
    paper = {f"jem_jax.{name}" for name in ("energy", "objective", "replay_buffer", "sgld", "wide_resnet.WideResNet")}
    assert imported == paper


@pytest.mark.slow
def test_accuracy_and_samples(tmp_path):
    picture = tmp_path / "digits.png"
    # As a user runs it, but for flags with which it compiles in half the time; the tests' own level makes it run slowly.
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("level=0", "level=1")}
    del environment["JAX_NUM_CPU_DEVICES"]
    # A quarter of its iterations is enough for the accuracy that the README promises of all.
    command = [sys.executable, SCRIPT, "--iterations=150", f"--picture={picture}"]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(re.search(r"test accuracy ([\d.]+)%", ended.stdout)[1]) >= 95
    drawn = image.imread(picture)[..., 0].reshape(10, 50, 10, 50).mean(axis=(1, 3))
    # Digits have bright strokes on black: grey or noise would have a mean brightness of a half.
    assert 0.1 < drawn.mean() < 0.45
