"""A trained model in a folder of four files, to be shared: it is read, and never written into.

model.json   settings, classes, results, how it was trained, and the SHA-256 of every other file
weights.npz  the network's variables by path, "params/conv1/kernel": kernels float16, all else float32
buffer.npz   `chains` uint8 [n, classes or 1, H, W, C], at most 1,000 of them; absent where there are none
README.md    the model card
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import jem_jax
from jem_jax import config as configuration
from jem_jax.augment import to_float, to_uint8
from jem_jax.common import files
from jem_jax.common.errors import UserError, first_line
from jem_jax.runs.workdir import RUN_FILE, RunFacts

FILE = "model.json"
MOST_CHAINS = 1000
_WEIGHTS, _BUFFER, _CARD = "weights.npz", "buffer.npz", "README.md"
_KIND = "jem_jax model"
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """The content of model.json."""

    facts: RunFacts
    iteration: int
    """how long it was trained"""
    about: dict[str, Any]
    """results, how it was trained, and whatever else the writer gave"""
    sha256: dict[str, str]
    """file -> hash"""


def is_one(path: Path) -> bool:
    """Whether a folder is to be read as a model folder rather than as a run."""
    return (path / FILE).is_file() and not (path / RUN_FILE).exists()


def containing(path: Path) -> Path | None:
    """The model folder that a path is, or lies in."""
    whole = path.absolute()
    return next((folder for folder in (whole, *whole.parents) if _kind(folder / FILE) == _KIND), None)


def describe(path: Path) -> Description:
    """Reads model.json.

    Raises:
      UserError: it is damaged, foreign, or of a newer version.
    """
    file = path / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); {_ANOTHER_COPY}") from error
    if not isinstance(values, dict) or values.get("kind") != _KIND:
        raise UserError(f"{file} is not of a jem_jax model (its kind is not {_KIND!r}); name a model folder or a run")
    if values.get("format") != _FORMAT:
        raise UserError(
            f"{file} is of format {values.get('format')}, and this version of jem_jax ({jem_jax.__version__}) reads "
            f"format {_FORMAT}; update jem_jax"
        )
    try:
        height, width, channels = map(int, values["image_shape"])
        facts = RunFacts(
            config=configuration.stored(values["config"]),
            image_shape=(height, width, channels),
            class_names=tuple(map(str, values["class_names"])),
            cpu_devices=0,
            fingerprint=str(values["data_fingerprint"]),
        )
        return Description(facts, int(values["iteration"]), dict(values["about"]), dict(values["sha256"]))
    except UserError as error:
        written = values.get("jem_jax")
        raise UserError(f"{file} was written by jem_jax {written} and does not fit this version: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}); {_ANOTHER_COPY}") from error


def read(path: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """The variables, and the buffer [n, classes or 1, H, W, C] float32 in [-1, 1] if there is one.

    Raises:
      UserError: a file is missing, is not what was written, or is no plain .npz.
    """
    sha256 = describe(path).sha256
    _whole(path, _CARD, sha256)
    stored = _arrays(path, _WEIGHTS, sha256)
    variables = unflatten_dict({tuple(name.split("/")): _full(array) for name, array in stored.items()})
    if _BUFFER not in sha256:
        return variables, None
    chains = _arrays(path, _BUFFER, sha256).get("chains")
    if chains is None or chains.dtype != np.uint8 or chains.ndim != 5:
        raise UserError(f"{path / _BUFFER} must hold 'chains', uint8 [n, classes or 1, H, W, C]; {_ANOTHER_COPY}")
    return variables, to_float(chains)


def write(
    path: Path,
    facts: RunFacts,
    iteration: int,
    variables: Mapping[str, Any],
    chains: np.ndarray | None,
    about: Mapping[str, Any],
    card: str,
) -> list[Path]:
    """Writes a model folder, whole or not at all.

    Args:
      path: a missing or empty folder.
      facts: its settings are those that others are to have: without paths of this machine.
      variables: nested dicts of arrays.
      chains: [n, classes or 1, H, W, C] float, n · classes at most 1,000; or None.
      about: JSON for people and programs: results, how it was trained.
      card: Markdown.

    Returns:
      The files.

    Raises:
      UserError: the folder is not empty, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--model_dir {path} is not empty; name an empty or missing folder")
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        flat = flatten_dict(variables, sep="/")
        weights: dict[str, Any] = {name: _stored(name, np.asarray(array)) for name, array in flat.items()}
        np.savez_compressed(partial / _WEIGHTS, **weights)
        if chains is not None:
            np.savez_compressed(partial / _BUFFER, chains=to_uint8(chains))
        (partial / _CARD).write_text(card, encoding="utf-8")
        description = {
            "kind": _KIND,
            "format": _FORMAT,
            "jem_jax": jem_jax.__version__,
            "config": configuration.as_dict(facts.config),
            "image_shape": facts.image_shape,
            "class_names": facts.class_names,
            "data_fingerprint": facts.fingerprint,
            "iteration": iteration,
            "about": dict(about),
            "sha256": {file.name: files.sha256(file) for file in sorted(partial.iterdir())},
        }
        files.write_json(partial / FILE, description)
        partial.rename(path)
    except OSError as error:
        raise UserError(f"--model_dir {path} cannot be written: {error.strerror}; name another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path.iterdir())


def as_stored(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables as they will be read back, rounded where they are stored in float16."""
    flat = flatten_dict(variables, sep="/")
    return unflatten_dict({name: _full(_stored(name, np.asarray(array))) for name, array in flat.items()}, sep="/")


_ANOTHER_COPY = "fetch the folder again"


def _stored(name: str, array: np.ndarray) -> np.ndarray:
    """Kernels in float16, unless one of their values is larger than that reaches."""
    if array.dtype == np.float32 and array.ndim > 1 and name.startswith("params/"):
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        return half if np.isfinite(half).all() else array
    return array


def _full(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _kind(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def _whole(path: Path, name: str, sha256: Mapping[str, str]) -> Path:
    """A file, which is what was written."""
    try:
        is_whole = files.sha256(path / name) == sha256.get(name)
    except OSError as error:
        raise UserError(f"model folder {path} is damaged: {name}: {error.strerror}; {_ANOTHER_COPY}") from error
    if not is_whole:
        raise UserError(f"model folder {path} is damaged: {name} is not what was written; {_ANOTHER_COPY}")
    return path / name


def _arrays(path: Path, name: str, sha256: Mapping[str, str]) -> dict[str, np.ndarray]:
    file = _whole(path, name, sha256)
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except Exception as error:
        # zipfile and NumPy raise errors of many kinds where a file is not theirs.
        raise UserError(f"{file} is no .npz of plain arrays ({first_line(error)}); {_ANOTHER_COPY}") from error
