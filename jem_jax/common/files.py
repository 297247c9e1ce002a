"""Files that are there whole or not at all, however a program ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` at the end of the block, or is deleted if that failed.

    Makes the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def version(path: Path) -> list[list[Any]]:
    """What tells states of a file or folder apart: its files' names, sizes in bytes and times of change in ns."""
    found = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    states = [(str(file), file.stat()) for file in found if file.exists()]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def is_partial(path: Path) -> bool:
    """Whether it is such a name."""
    return path.name.startswith(".") and path.name.endswith(".partial")
