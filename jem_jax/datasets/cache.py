"""Decoded images in an .npz, with a note of their source and their SHA-256. A damaged file counts as missing."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jem_jax.common import files
from jem_jax.datasets.dataset import Split
from jem_jax.datasets.held_out import Parts

_PARTS = ("train", "validation", "test")


def read(file: Path, made_from: Mapping[str, Any]) -> Parts | None:
    """The images written before; None if they are missing, damaged, or made from another source.

    Args:
      file: the .npz.
      made_from: JSON that says what it must have been made from.
    """
    try:
        note = json.loads(_note(file).read_text(encoding="utf-8"))
        if note != {"made_from": dict(made_from), "size": file.stat().st_size, "sha256": files.sha256(file)}:
            return None
        with np.load(file, allow_pickle=False) as arrays:
            splits = {
                part: Split(arrays[f"{part}_images"], arrays[f"{part}_labels"])
                for part in _PARTS
                if f"{part}_images" in arrays
            }
            return Parts(tuple(arrays["class_names"].tolist()), **splits)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def write(file: Path, made_from: Mapping[str, Any], parts: Parts) -> None:
    """Keeps decoded images for `read`: the note comes last, so that an interrupted write is a missing one."""
    splits = {part: split for part in _PARTS if (split := getattr(parts, part)) is not None}
    arrays = {f"{part}_images": split.images for part, split in splits.items()}
    arrays |= {f"{part}_labels": split.labels for part, split in splits.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    _note(file).unlink(missing_ok=True)
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as opened:
        np.savez(opened, class_names=np.array(parts.class_names), **arrays)
    partial.replace(file)
    note = {"made_from": dict(made_from), "size": file.stat().st_size, "sha256": files.sha256(file)}
    partial.write_text(json.dumps(note, indent=1), encoding="utf-8")
    partial.replace(_note(file))


def _note(file: Path) -> Path:
    return file.with_suffix(".json")
