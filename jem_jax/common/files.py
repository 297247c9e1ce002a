"""Files that are there whole or not at all, however a program ends, and files that one program holds."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def held(path: Path, waits: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a lock file for this program alone; the lock ends with the program, however that ends.

    Where the file system has no locks, a second file that names this program stands for one. Another program on the
    same machine sees whether it still runs.

    Args:
      waits: is called before waiting for another program; None: not to wait.

    Raises:
      BlockingIOError: another program holds it.
      OSError: it cannot be written.
    """
    # The library's own fallback takes an empty file that was left by a real lock for one that is held.
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
    """What tells the contents of a file or folder apart: its files' names below it, and their SHA-256."""
    inner = (entry for entry in path.rglob("*") if entry.is_file() and not is_litter(entry))
    found = sorted(inner) if path.is_dir() else [path]
    return [[str(file.relative_to(path)), sha256(file)] for file in found if file.is_file()]


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
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
    """Whether it is what systems and tools leave in every folder: hidden files, `lost+found`, `Thumbs.db` and such."""
    return path.name.startswith(".") or path.name in _LITTER


def is_log(path: Path) -> bool:
    """Whether it is where this program's output goes, or is named like a log, as a batch system writes it; or a folder
    that holds only such."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(stream), path.stat()):
                return True
    if path.is_dir():
        inner = list(path.iterdir())
        return inner != [] and all(is_litter(entry) or is_log(entry) for entry in inner)
    return _LOG.search(path.name.lower()) is not None
