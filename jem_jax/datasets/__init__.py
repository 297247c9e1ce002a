"""Data sets as uint8 images and integer labels, in splits that never depend on the run's seed."""

import difflib
import os
from pathlib import Path

from jem_jax.common import files, paths
from jem_jax.common.errors import UserError, shown
from jem_jax.config import Data
from jem_jax.datasets import checks, digits, own_folder, own_npz, prepared, resize, tfds_named
from jem_jax.datasets.dataset import Dataset, Split
from jem_jax.datasets.sources import SOURCES

__all__ = ["Dataset", "Split", "check_name", "load", "version"]

_NAMES = (digits.NAME, *SOURCES)


def load(data: Data) -> Dataset:
    """The data set that the settings name: whole, uint8, in memory.

    `data.name` is "digits", one of `sources.SOURCES`, "tfds:" and a name of tensorflow-datasets, or the path of an .npz
    or of a folder of class folders.

    Raises:
      UserError: in one line, there is no such data set, it can't be had, or something is wrong with it.
    """
    if data.image_size % checks.STRIDE:
        raise UserError(f"config.data.image_size must be a multiple of {checks.STRIDE}, not {data.image_size}")
    dataset = resize.dataset_to_side(_load(data), data.image_size)
    checks.sides(dataset)
    return dataset


def version(name: str) -> list[list[str]]:
    """`files.version` of one's own data; empty for a data set that has a name alone, which is always the same."""
    if name in _NAMES or name.startswith(tfds_named.PREFIX):
        return []
    return files.version(paths.local("config.data.name", name))


def check_name(setting: str, name: str) -> None:
    """Makes sure that there can be a data set of that name, without reading it.

    Args:
      setting: that gives the name, for the error.

    Raises:
      UserError: it is none of the names, and no .npz and no folder is there.
    """
    if name in _NAMES or name.startswith(tfds_named.PREFIX):
        return
    path = paths.local(setting, name)
    if not (path.is_dir() or (path.is_file() and path.suffix.lower() == ".npz")):
        raise UserError(_no_such(setting, name, path))


def _load(data: Data) -> Dataset:
    name = data.name
    check_name("config.data.name", name)
    if name == digits.NAME:
        return digits.load()
    if name in SOURCES:
        manual_dir = paths.local("config.data.manual_dir", data.manual_dir) if data.manual_dir else None
        return prepared.load(SOURCES[name], prepared.data_folder(data.data_dir), manual_dir)
    if name.startswith(tfds_named.PREFIX):
        name = name.removeprefix(tfds_named.PREFIX)
        return tfds_named.load(name, prepared.data_folder(data.data_dir), data.image_size)
    path = paths.local("config.data.name", name)
    return own_folder.load(path, data.image_size) if path.is_dir() else own_npz.load(path)


def _no_such(setting: str, name: str, path: Path) -> str:
    if path.exists():
        return f"{setting} {shown(name)} must be an .npz file or a folder of class folders of images"
    if path.suffix.lower() == ".npz" or os.sep in name:
        return f"{setting} {shown(name)}: there is no such file or folder"
    plain = name.lower().replace("-", "_")
    near = [f"{tfds_named.PREFIX}{known}" for known in tfds_named.known() if known == plain and known not in SOURCES]
    near = near or difflib.get_close_matches(plain, _NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? There" if near else "there"
    return (
        f"{setting} {shown(name)} is not a data set; {hint} are {', '.join(_NAMES)}, tfds:NAME for others of "
        "tensorflow-datasets, and the path of an .npz or of a folder of class folders"
    )
