"""Decoded images in an .npz, with a note of their source. A damaged file counts as missing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jem_jax.common import files
from jem_jax.datasets.dataset import Split
from jem_jax.datasets.held_out import Splits

_PARTS = ("train", "validation", "test")


def read(file: Path, made_from: Mapping[str, Any]) -> Splits | None:
    """The images written before; None if they are missing, damaged, or made from another source.

    Args:
      file: the .npz.
      made_from: JSON that says what it must have been made from.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if json.loads(arrays["made_from"].item()) != made_from:
                return None
            splits = {
                part: Split(arrays[f"{part}_images"], arrays[f"{part}_labels"])
                for part in _PARTS
                if f"{part}_images" in arrays
            }
            return Splits(tuple(arrays["class_names"].tolist()), **splits)
    except MemoryError:
        raise
    except Exception:
        # A zip file has a checksum of every array. zipfile and NumPy raise errors of many kinds where one is damaged.
        return None


def write(file: Path, made_from: Mapping[str, Any], parts: Splits) -> None:
    """Keeps decoded images for `read`."""
    arrays: dict[str, Any] = {"made_from": np.array(json.dumps(made_from)), "class_names": np.array(parts.class_names)}
    for part in _PARTS:
        if (split := getattr(parts, part)) is not None:
            arrays |= {f"{part}_images": split.images, f"{part}_labels": split.labels}
    with files.whole(file) as partial, partial.open("wb") as opened:
        np.savez(opened, **arrays)
