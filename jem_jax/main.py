"""The command: flags -> one call; errors -> one line.

python -m jem_jax.main --config=configs/digits.py
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jem_jax.commands import command_line
from jem_jax.common import paths

_MODES = ("train", "evaluate", "sample")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0: done. 2: something given was wrong, said in one line. 130 or 143: stopped by Ctrl-C or SIGTERM, all saved.
    """
    return command_line.guarded(_run, sys.argv[1:] if arguments is None else list(arguments))


def entry_point() -> None:
    """The console script `jem-jax`."""
    command_line.end_at_ctrl_c()
    sys.exit(main())


def _run(arguments: Sequence[str]) -> int:
    from jem_jax.commands import config_files

    parser = _parser()
    flags, rest = parser.parse_known_args(arguments)
    config = config_files.read(flags.config, command_line.overrides(parser, rest))
    if not flags.debug:
        _quiet_libraries()
    # JAX and all that needs it come only now, so that a wrong flag is said at once.
    command_line.import_jax()
    from jem_jax.commands import modes
    from jem_jax.distributed import processes

    path = paths.local("--workdir", flags.workdir or f"runs/{Path(flags.config).stem}")
    cluster = processes.Cluster(flags.coordinator_address, flags.num_processes, flags.process_id, flags.distributed)
    return modes.run(flags.mode, config, path, flags.overwrite, cluster, flags.require_devices)


def _parser() -> command_line.Parser:
    from jem_jax import config as configuration

    parser = command_line.Parser(
        prog="jem-jax",
        description="Trains a joint energy-based model, evaluates it, or samples from it.",
        epilog="settings, with their defaults:\n" + "\n".join(configuration.describe()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help=f"a config file, or one of: {_names()}")
    add("--mode", choices=_MODES, default="train", help="train (or go on with) a run, evaluate it, or draw samples")
    add("--workdir", metavar="DIR", help="where the run lives; default: runs/<config name>")
    add("--overwrite", action="store_true", help="start anew, deleting the run that the workdir holds")
    add("--require_devices", type=int, default=1, metavar="N", help="refuse to start with fewer devices in all")
    add("--distributed", action="store_true", help="one of several processes, on a TPU pod, Slurm or Kubernetes")
    add("--coordinator_address", metavar="HOST:PORT", help="of the first process, where JAX cannot find it itself")
    add("--num_processes", type=int, metavar="N", help="with --coordinator_address")
    add("--process_id", type=int, metavar="I", help="with --coordinator_address, from 0")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _names() -> str:
    from jem_jax.commands import config_files

    return ", ".join(sorted(config_files.packaged()))


def _quiet_libraries() -> None:
    """Keeps libraries' logs off the screen: what a person must know of them, an error of ours says in one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "jax", "matplotlib"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    entry_point()
