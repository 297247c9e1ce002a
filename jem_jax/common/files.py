"""Files that are written whole or not at all, and files that lock out other programs."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""what file systems without locks say, such as Lustre without `flock` and NFS without its lock service"""

_LITTER = (
    "lost+found", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "__MACOSX", "Icon\r", "@eaDir", "#recycle",
    "#snapshot", "$RECYCLE.BIN", "System Volume Information", "Network Trash Folder", "Temporary Items", "__pycache__",
)  # fmt: skip
_LOG = re.compile(
    r"\.(log|out|err|[oe]\d+)(\.\d+)?$|(^|[-_.])(log|slurm|nohup|stdout|stderr|output)s?\b|^core(\.\d+)?$"
)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which replaces it at the end of the block. If the block fails, it is deleted.

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


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and makes its folder."""
    with whole(path) as partial:
        # A file name need not be Unicode.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all, and makes the folder."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def held(path: Path, waits: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a lock file for this program alone. The lock ends with the program, even if that is killed.

    On a file system without locks a second file names this program instead. Others on the same machine check whether it
    still runs.

    Args:
      waits: is called before waiting for another program; None: do not wait.

    Raises:
      BlockingIOError: another program holds it.
      OSError: it cannot be written.
    """
    # The library's own fallback mistakes an empty file left by a real lock for a held one.
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        _acquire(lock, waits)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(path.with_name(f"{path.name}.held"))
        _acquire(lock, waits)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, waits: Callable[[], None] | None) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if waits is None:
            raise BlockingIOError(errno.EWOULDBLOCK, "another program holds it", lock.lock_file) from error
        waits()
        lock.acquire()


def version(path: Path) -> list[list[str]]:
    """Names and SHA-256 of a file, or of all files of a folder: equal if the contents are."""
    inner = (entry for entry in path.rglob("*") if entry.is_file() and not is_litter(entry))
    entries = sorted(inner) if path.is_dir() else [path]
    return [[str(file.relative_to(path)), sha256(file)] for file in entries if file.is_file()]


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def remove(folder: Path, patterns: Iterable[str]) -> None:
    """Deletes the files of a folder that match, and folders below it that held nothing else."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)
            remove_empty(*(parent for parent in path.parents if folder in parent.parents))


def remove_empty(*folders: Path) -> None:
    """Deletes those of the folders that are empty, in this order; a link to a folder stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def is_litter(path: Path) -> bool:
    """Whether systems and tools leave such files in every folder: hidden files, `lost+found`, `Thumbs.db` and so on."""
    return path.name.startswith(".") or path.name in _LITTER


def is_log(path: Path) -> bool:
    """Whether this program's output goes there, or its name is that of a log, as batch systems write it.

    A folder of such files alone is one too.
    """
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(stream), path.stat()):
                return True
    if path.is_dir():
        inner = list(path.iterdir())
        return inner != [] and all(is_litter(entry) or is_log(entry) for entry in inner)
    return _LOG.search(path.name.lower()) is not None
