"""Flags of a command, and its errors said in one line."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jem_jax.common.errors import UserError, printable, shown


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise UserError(f"{message}; --help lists the flags")


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """A command's exit status, its errors said in one line unless --debug is among the arguments."""
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("jem-jax: stopped; the same command goes on", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        if "--debug" in arguments:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.strerror}: {shown(error.filename)}"
        # A file's name can hold anything.
        print(f"jem-jax: {printable(' '.join(text.split()))}", file=sys.stderr)
        return 2


def import_jax() -> None:
    """Imports JAX, which reads its environment variables then.

    Raises:
      UserError: one of them is not what JAX takes.
    """
    try:
        importlib.import_module("jax")
    except ValueError as error:
        raise UserError(f"JAX cannot start: {error}; correct that environment variable, or unset it") from error


def overrides(parser: Parser, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The ("group.key", "text") pairs of `--config.group.key=text` arguments; anything else is an error."""
    pairs = []
    for argument in arguments:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config."):
            parser.error(f"unknown argument {shown(argument)}")
        if not equals:
            cut = shown(argument)[1:-1]
            parser.error(f"{cut} needs a value: {cut}=VALUE")
        pairs.append((name, text))
    return pairs
