"""What is said on the way, on stderr: stdout is for results."""

import sys

from jem_jax.common.errors import printable


def say(text: str) -> None:
    """One line for a person to read."""
    print(printable(text), file=sys.stderr, flush=True)
