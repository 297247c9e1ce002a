"""A wheel installed elsewhere is the whole program, its configs included."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command import SHORT
from PIL import Image

import jem_jax

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("jem_jax", "configs", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", source / "dist", source]
    subprocess.run(command, check=True)
    return next((source / "dist").glob("*.whl"))


def test_the_wheel_holds_every_module_and_config_and_the_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jem_jax").rglob("*.py")}
    configs = {f"jem_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert modules | configs | {"jem_jax/py.typed"} <= names
    outside = ("configs/", "tests/", "experiments/")
    assert not [name for name in names if name.startswith(outside) or name.endswith(".npz")]


@pytest.mark.slow
def test_an_installed_wheel_runs_the_readmes_command(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel], check=True
    )
    # Compiled as users do: without the tests' own flags.
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(target), "XLA_FLAGS": ""}}
    how |= {"capture_output": True, "text": True}
    where = subprocess.run([sys.executable, "-c", "import jem_jax; print(jem_jax.__file__)"], **how)
    assert Path(where.stdout.strip()).is_relative_to(target)
    ended = subprocess.run([sys.executable, target / "bin" / "jem-jax", *SHORT, "--config=configs/digits.py"], **how)
    assert (ended.returncode, ended.stderr) == (0, "")
    output = ended.stdout

    run = tmp_path / "runs" / "digits"
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["run"]["iterations"] == 18
    assert report["run"]["split_sizes"] == {"train": 1167, "validation": 130, "test": 500}
    assert report["run"]["seconds"].keys() == {"training", "evaluation"}
    assert report["sections"].keys() == {"classification", "samples"}
    assert report["run"]["versions"]["jem_jax"] == jem_jax.__version__

    pictures = [run / "report" / f"{name}.png" for name in ("samples", "samples_by_class", "buffer_by_class")]
    for picture in (*pictures, run / "samples" / "buffer_0000018.png"):
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert min(pixels.shape) > 8
        assert len(np.unique(pixels)) > 8

    # What is about to happen, what came of it, and where to look.
    assert "JEM: 4 CPU devices; 77,418 parameters; " in output
    assert "18 iterations will take about" in output
    for path in (*pictures, run / "report" / "report.json", run / "report" / "report.html"):
        assert str(path.relative_to(tmp_path)) in output
    assert f"{100 * report['jem']['accuracy']:.2f} %" in output
