"""A wheel installed elsewhere is the whole program, its configs included."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command import HELPERS, TINY

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
def test_an_installed_wheel_runs_a_config_that_came_with_it(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel], check=True
    )
    # The tests' folder has the network.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(HELPERS)])}
    where = subprocess.run(
        [sys.executable, "-c", "import jem_jax; print(jem_jax.__file__)"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(target)
    script = target / "bin" / "jem-jax"
    subprocess.run(
        [sys.executable, script, *TINY, "--config=configs/digits.py"], cwd=tmp_path, env=environment, check=True
    )
    report = json.loads((tmp_path / "runs" / "digits" / "report" / "report.json").read_text())
    assert 0 <= report["jem"]["accuracy"] <= 1
