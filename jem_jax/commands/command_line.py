"""Flags of a command, and its errors said in one line."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from jem_jax.common import streams
from jem_jax.common.errors import UserError, printable, shown

_LAST_SECONDS = 3
"""that a command has to end by itself after Ctrl-C"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise UserError(f"{message}; --help lists the flags")


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """A command's exit status, its errors said in one line unless --debug is among the arguments."""
    with streams.unfailing():
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


def end_at_ctrl_c() -> None:
    """Makes Ctrl-C end this process, where it is one of its own, even if the exception gets lost.

    Python drops an exception that is raised in a callback of the garbage collector, and some libraries catch it while
    they are imported.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it at once
        timer = threading.Timer(_LAST_SECONDS, os._exit, (130,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def import_jax() -> None:
    """Imports JAX and Flax, which read their environment variables then.

    Raises:
      UserError: one of them is not what JAX, XLA or Flax takes.
    """
    if os.environ.get("XLA_FLAGS") and "jax" not in sys.modules:
        _try_xla_flags()
    try:
        importlib.import_module("jax")
        importlib.import_module("flax")
    except ValueError as error:
        raise UserError(f"JAX cannot start: {error}; correct that environment variable, or unset it") from error


def _try_xla_flags() -> None:
    """Reads XLA_FLAGS in another process (0.3 s): XLA ends the one that has a flag that it does not know."""
    program = "from jaxlib import xla_client; xla_client.CompileOptions()"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    said = re.search(r"(?:parse_flags_from_env|command_line_flags)\.cc:\d+\] (.*)", ended.stderr)
    if ended.returncode and said:
        raise UserError(f"XLA cannot start: {said[1]}; correct the environment variable XLA_FLAGS, or unset it")


def overrides(parser: Parser, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The ("group.key", "text") pairs of `--config.group.key=text` arguments; anything else is an error."""
    pairs = []
    for argument in arguments:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config."):
            hint = "; settings are --config.group.key=VALUE" if equals else ""
            parser.error(f"unknown argument {shown(argument)}{hint}")
        if not equals:
            cut = shown(argument)[1:-1]
            parser.error(f"{cut} needs a value: {cut}=VALUE")
        pairs.append((name, text))
    return pairs
