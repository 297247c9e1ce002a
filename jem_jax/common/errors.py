"""The error for users, and functions that quote foreign values and errors in one line."""

from typing import Any

_LONGEST = 100


class UserError(Exception):
    """A fault of the user's input. Its text is one line: what is wrong, where, and what would be right."""


def shown(value: Any) -> str:
    """A value as Python writes it, in one line of at most some hundred characters."""
    try:
        # A ConfigDict is written over several lines.
        text = " ".join(repr(value).splitlines())
    except Exception:  # an int of more digits than Python writes, or an error of a foreign class
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def printable(text: str) -> str:
    """The text, with characters escaped that would control a terminal or end the line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
