"""The one kind of error that a person is meant to read."""


class UserError(Exception):
    """Something the user gave is wrong. Its text is one line: what is wrong, where, and what would be right."""
