"""Paths from flags, settings and environment variables, expanded and checked."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from jem_jax.common.errors import UserError, shown

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local(what: str, text: str) -> Path:
    """A text as a path of this machine, with `~` expanded. Nothing need exist there.

    Args:
      what: the flag, setting or variable with the text, for the error.

    Raises:
      UserError: it is empty, an address such as gs://bucket/run, or no file can have that name.
    """
    if not text:
        # What a shell makes of a variable that is not set.
        raise UserError(f"{what} is empty; name a path, or leave it out")
    scheme = _SCHEME.match(text)
    if scheme:
        raise UserError(
            f"{what} {shown(text)} is an address of {scheme[1]}:, and only paths of this machine are read and written; "
            "copy or mount it"
        )
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, the home of nobody, characters that no name has
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{what} {shown(text)} cannot be a path: {reason}") from error
    return path


def check_working_folder() -> None:
    """Makes sure that there is one, which libraries take for granted.

    Raises:
      UserError: it was deleted.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("the working folder does not exist any more; change to one that does") from error


@contextlib.contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Lets Python find modules in these folders first, for as long as the block lasts."""
    added = list(dict.fromkeys(str(folder.absolute()) for folder in folders))
    sys.path[:0] = added
    # A module may be younger than Python's list of what the folder holds.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
