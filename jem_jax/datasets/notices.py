"""What is said on the way, on stderr: stdout is for results."""

import sys

from jem_jax.common.errors import printable


def say(text: str) -> None:
    """One line for a person to read."""
    print(printable(text), file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
