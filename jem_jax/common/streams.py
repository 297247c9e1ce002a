"""stdout and stderr that may be closed, full, no longer read or not Unicode: a run goes on without what they lose."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Prints what can be printed: a character that a stream lacks is written out, and a stream that fails is left."""
    _fill_descriptors()
    with contextlib.redirect_stdout(_wrapped(sys.stdout)), contextlib.redirect_stderr(_wrapped(sys.stderr)):
        yield


def _fill_descriptors() -> None:
    """Puts /dev/null where a standard descriptor is closed: the next file to be opened would take its number, and XLA's
    own messages, for example, would be written into a checkpoint."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest number that is free.
            os.open(os.devnull, os.O_RDWR)


def _wrapped(stream: TextIO | None) -> Any:
    # Python has no stream for a descriptor that was closed.
    return _Unfailing(stream or open(os.devnull, "w", encoding="utf-8"))


class _Unfailing:
    """A text stream whose `write` and `flush` raise no OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what the stream can take."""
        with self._leaving():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Sends it on, if anybody takes it."""
        with self._leaving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass  # a reader that is slow
        except (OSError, ValueError):  # ValueError: closed by other code of this process
            # What the stream still holds would fail once more when Python ends, and change the exit status.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
