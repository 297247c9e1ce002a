"""stdout and stderr that may be closed, full, no longer read or not Unicode. A run goes on, and loses the output."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Makes printing never fail. Characters that a stream lacks are escaped, and a failing stream goes to /dev/null."""
    _fill_descriptors()
    with contextlib.redirect_stdout(_wrapped(sys.stdout)), contextlib.redirect_stderr(_wrapped(sys.stderr)):
        yield


def _fill_descriptors() -> None:
    """Opens /dev/null in place of closed standard descriptors.

    The next file to be opened would take their numbers. XLA's messages, for example, would go into a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # `open` takes the lowest free number.
            os.open(os.devnull, os.O_RDWR)


def _wrapped(stream: TextIO | None) -> Any:
    # Python has no stream for a descriptor that was closed.
    return _Unfailing(stream or open(os.devnull, "w", encoding="utf-8"))


class _Unfailing:
    """A text stream whose `write` and `flush` raise no OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text, with characters escaped that the stream lacks."""
        with self._leaving():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, if it can be."""
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
