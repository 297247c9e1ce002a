"""A lock around the making of files that several processes read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jem_jax.common import files
from jem_jax.common.errors import UserError, first_line
from jem_jax.datasets.notices import say


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder, which is made if missing; waits for another process that does.

    Args:
      what: is made in it, for messages.

    Raises:
      UserError: instead of an OSError, of the lock or of what is done under it, in one line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.held(
            folder / ".lock", lambda: say(f"another program is preparing {what} in {folder}; waiting for it")
        ):
            yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be prepared in {folder}: {error.strerror or first_line(error)}; name another place with "
            "--config.data.data_dir=DIR"
        ) from error
