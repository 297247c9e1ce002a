"""python -m jem_jax.import_official: makes a workdir of a checkpoint of the official PyTorch code."""

import sys

from jem_jax.commands.import_checkpoint import command

__all__ = ["command"]

if __name__ == "__main__":
    sys.exit(command())
