"""Notices on stderr; stdout is for results."""

import sys

from jem_jax.common.errors import printable


def say(text: str) -> None:
    """Prints a line."""
    print(printable(text), file=sys.stderr, flush=True)
