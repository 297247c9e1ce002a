"""Paths that people type, where Python looks for their modules, and accounts without a home."""

import os
import pwd
import shlex
import sys
from pathlib import Path

import jax
import pytest

import jem_jax
from jem_jax import datasets, torch_import
from jem_jax.commands import config_files, import_checkpoint
from jem_jax.common import paths
from jem_jax.common.errors import UserError
from jem_jax.config import Data, Model
from jem_jax.distributed import processes
from jem_jax.import_official import command
from jem_jax.main import main
from jem_jax.training import network


@pytest.mark.parametrize(
    "flag",
    ["--workdir", "--config", "--config.data.name", "--config.data.data_dir", "--config.data.manual_dir",
     "--config.evaluation.ood_sets", "--config.evaluation.inception_weights", "--config.training.init_from"],
)  # fmt: skip
def test_an_address_is_refused_in_a_line(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    more = ["--config.data.name=mnist"] if flag.endswith("_dir") else []
    assert main(["--config=digits", *more, f"{flag}=gs://bucket/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flag.removeprefix('--') if 'config.' in flag else flag} 'gs://bucket/x' is an address of" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["s3://bucket/x", "file:///x", "https://host/x.npz", "gs:/bucket"])
def test_an_address_is_refused_from_python_and_by_the_import_too(tmp_path, monkeypatch, capsys, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", address)
    monkeypatch.setattr(torch_import, "_read", lambda path: pytest.fail("it was read"))
    for refused in (jem_jax.load, torch_import.load, lambda _: datasets.load(Data(name="mnist"))):
        with pytest.raises(UserError, match="is an address of"):
            refused(address)
    for arguments in ([address, "--workdir=run"], ["x.pt", f"--workdir={address}"]):
        assert command(["--config=digits", *arguments]) == 2
        assert "is an address of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2024:run", "a:b/c", "run", "./x", "C:/x"])
def test_other_colons_are_part_of_a_name(name):
    assert paths.local("--workdir", name) == Path(name)


def test_home_is_meant_by_a_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from jem_jax.config import default as get_config\n")
    assert config_files.find("~/mine.py") == tmp_path / "mine.py"
    assert main(["--config=~/mine.py", "--workdir=~/run", "--mode=evaluate"]) == 2
    assert f"{tmp_path}/run holds no run" in capsys.readouterr().err
    for function in (jem_jax.load, torch_import.load):
        with pytest.raises(UserError, match=f"{tmp_path}/run"):
            function("~/run")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/data")
    assert datasets.prepared.data_folder("") == tmp_path / "data"
    assert datasets.prepared.data_folder("~/other") == tmp_path / "other"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert datasets.prepared.data_folder("") == tmp_path / "tensorflow_datasets"


def test_a_working_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert main(["--config=digits", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "the working folder does not exist any more; change to one that does" in capsys.readouterr().err


def _network(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(f"import {name}_part\nfrom tiny import mlp\n")
    (folder / f"{name}_part.py").touch()


def test_a_network_is_found_in_the_working_folder_and_beside_the_config(tmp_path, monkeypatch):
    _network(tmp_path, "net_here")
    _network(tmp_path / "configs", "net_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    before = list(sys.path)
    with pytest.raises(UserError, match="No module named 'net_there'"):
        network.build(Model(factory="net_there:mlp"), 3)
    network.look_in(tmp_path / "configs")
    for name in ("net_here", "net_there"):
        assert network.build(Model(factory=f"{name}:mlp"), 3).module.num_classes == 3
    network.look_in()
    assert sys.path == before


def test_config_files_import_their_own_neighbours(tmp_path):
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "neighbour.py").write_text(f"SEED = {seed}\n")
        (folder / "mine.py").write_text(
            "from neighbour import SEED\nfrom jem_jax.config import default\n\n"
            "def get_config():\n    config = default()\n    config.seed = SEED\n    return config\n"
        )
        before = list(sys.path)
        assert config_files.read(str(folder / "mine.py")).seed == seed
        assert sys.path == before
    (tmp_path / "link.py").symlink_to(tmp_path / "3" / "mine.py")
    assert config_files.read(str(tmp_path / "link.py")).seed == 3


def test_a_printed_command_can_be_pasted():
    overrides = [("data.name", "c 10.npz"), ("optimizer.decay_epochs", "(1, 2)"), ("model.depth", "10")]
    words = shlex.split(import_checkpoint._next_command("my config.py", "a'b; $HOME", overrides))
    assert words[4:] == ["--config=my config.py", "--workdir=a'b; $HOME",
                         *(f"--config.{name}={text}" for name, text in overrides)]  # fmt: skip


def _compilation_cache(monkeypatch):
    """The folder that is chosen; None where there is none."""
    chosen = {}
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", chosen.__setitem__)
        processes._use_compilation_cache()
    return chosen.get("jax_compilation_cache_dir")


def test_an_account_without_a_home(monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no entry"])
    assert _compilation_cache(monkeypatch) is None
    assert len(datasets.load(Data(name="digits")).train) == 1167
    with pytest.raises(UserError, match=r"set --config.data.data_dir=DIR or TFDS_DATA_DIR.* home directory"):
        datasets.load(Data(name="mnist"))


@pytest.mark.parametrize(
    ("home", "variables", "wanted"),
    [
        ("home", {}, "home/.cache/jem_jax/xla"),
        ("home", {"XDG_CACHE_HOME": "here"}, "home/.cache/jem_jax/xla"),
        ("home", {"XDG_CACHE_HOME": "gs://b"}, "home/.cache/jem_jax/xla"),
        ("file", {}, None),
        ("home", {"JAX_COMPILATION_CACHE_DIR": "~/x"}, "home/x"),
        ("home", {"JAX_COMPILATION_CACHE_DIR": "file/x"}, None),
        ("home", {"JAX_COMPILATION_CACHE_DIR": ""}, None),
        ("home", {"JAX_COMPILATION_CACHE_DIR": "gs://b/x"}, None),
    ],
)
def test_compiled_programs_are_kept_where_that_can_be_written(tmp_path, monkeypatch, home, variables, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in {"XDG_CACHE_HOME": "", "HOME": str(tmp_path / home), **variables}.items():
        monkeypatch.setenv(name, value)
    assert _compilation_cache(monkeypatch) == (wanted and str(tmp_path / wanted))
    assert sorted(os.listdir(tmp_path)) == (["file", "home"] if wanted else ["file"])
