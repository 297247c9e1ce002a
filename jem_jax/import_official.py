"""python -m jem_jax.import_official: makes a workdir of a checkpoint of the official PyTorch code."""

import sys
from collections.abc import Sequence

from jem_jax.commands import command_line


def command(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, as `jem_jax.main.main` does."""
    return command_line.guarded(_run, sys.argv[1:] if arguments is None else list(arguments))


def _run(arguments: Sequence[str]) -> int:
    command_line.import_jax()
    from jem_jax.commands import import_checkpoint

    return import_checkpoint.run(arguments)


if __name__ == "__main__":
    command_line.end_at_ctrl_c()
    sys.exit(command())
