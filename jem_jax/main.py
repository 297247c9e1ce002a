"""The command: flags -> one call; errors -> one line. Settings, `--config.group.name`, are in `jem_jax.config`.

python -m jem_jax.main --config=configs/digits.py
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jem_jax.commands import command_line
from jem_jax.common import paths

if TYPE_CHECKING:
    from jem_jax.config import Config

_MODES = ("train", "evaluate", "sample", "export_model")
_MODES_IN_WORDS = (
    "train (or go on with) a run, evaluate it, draw samples, or make a model folder of the last checkpoint"
)


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

    paths.check_working_folder()
    parser = _parser()
    flags, rest = parser.parse_known_args(arguments)
    overrides = command_line.overrides(parser, rest)
    _check(parser, flags)
    config = None if flags.config is None else config_files.read(flags.config, overrides)
    with contextlib.nullcontext() if flags.debug else _quiet_libraries():
        return _start(flags, config, overrides)


def _start(flags: argparse.Namespace, config: "Config | None", overrides: Sequence[tuple[str, str]]) -> int:
    # JAX and all that needs it come only now, so that a wrong flag is said at once.
    command_line.import_jax()
    from jem_jax.commands import config_files, export_model, modes
    from jem_jax.distributed import processes
    from jem_jax.training import network

    if config is not None:
        network.look_in(config_files.find(flags.config).parent)
    path = paths.local("--workdir", f"runs/{Path(flags.config).stem}" if flags.workdir is None else flags.workdir)
    if config is None:
        config = modes.settings_of(path, overrides)
    if flags.mode == "export_model":
        return export_model.execute(config, path, paths.local("--model_dir", flags.model_dir), flags.data_set)
    cluster = processes.Cluster(flags.coordinator_address, flags.num_processes, flags.process_id, flags.distributed)
    report_dir = None if flags.report_dir is None else paths.local("--report_dir", flags.report_dir)
    return modes.execute(flags.mode, config, path, flags.overwrite, cluster, flags.require_devices, report_dir)


def _check(parser: command_line.Parser, flags: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if flags.config is None and (flags.mode == "train" or flags.workdir is None):
        parser.error("the following arguments are required: --config")
    if (flags.mode == "export_model") != (flags.model_dir is not None):
        parser.error("--mode=export_model and --model_dir go together")
    if flags.data_set and flags.mode != "export_model":
        parser.error("--data_set goes with --mode=export_model")
    if flags.overwrite and flags.mode == "export_model":
        parser.error("--overwrite does not go with --mode=export_model, which deletes nothing")


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
    add(
        "--config", metavar="FILE", help=f"a config file, or one of: {_names()}; default but in training: the workdir's"
    )
    add("--mode", choices=_MODES, default="train", help=_MODES_IN_WORDS)
    add("--workdir", metavar="DIR", help="where the run lives, or a model folder; default: runs/<config name>")
    add(
        "--report_dir",
        metavar="DIR",
        help="where reports and samples go; default: the workdir, or runs/<name> if that is only read",
    )
    add("--model_dir", metavar="DIR", help="the model folder that export_model makes: missing or empty")
    add(
        "--data_set",
        metavar="NAME",
        help="with export_model: the data's public name, such as cifar10 for an .npz of it",
    )
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


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences libraries' logs; what users must know is a `UserError`. The old levels come back at the end."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    levels = {logger: logger.level for logger in map(logging.getLogger, ("absl", "jax", "matplotlib"))}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


if __name__ == "__main__":
    entry_point()
