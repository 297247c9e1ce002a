"""The one kind of error that a person is meant to read, and values from outside quoted in one line of text."""

from typing import Any

_LONGEST = 100


class UserError(Exception):
    """Something the user gave is wrong. Its text is one line: what is wrong, where, and what would be right."""


def shown(value: Any) -> str:
    """What was given, as Python would write it, cut where it is overlong."""
    try:
        # A ConfigDict is written over several lines.
        text = " ".join(repr(value).splitlines())
    except Exception:  # an int of more digits than Python writes, and whatever a foreign class raises
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def printable(text: str) -> str:
    """The same text, with every character that would steer a terminal or end its line written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
