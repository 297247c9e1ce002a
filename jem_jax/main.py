"""The command: flags -> one call; errors -> one line.

python -m jem_jax.main --config=configs/digits.py
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from jem_jax import config as configuration
from jem_jax import config_files
from jem_jax.errors import UserError
from jem_jax.words import printable, shown

_MODES = ("train", "evaluate", "sample")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise UserError(f"{message}; --help lists the flags")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0: done. 2: something given was wrong, said in one line. 130 or 143: stopped by Ctrl-C or SIGTERM, all saved.
    """
    return guarded(_run, sys.argv[1:] if arguments is None else list(arguments))


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


def entry_point() -> None:
    """The console script `jem-jax`."""
    sys.exit(main())


def _run(arguments: Sequence[str]) -> int:
    parser = _parser()
    flags, rest = parser.parse_known_args(arguments)
    config = config_files.read(flags.config, overrides(parser, rest))
    if not flags.debug:
        _quiet_libraries()
    # JAX and all that needs it come only now, so that a wrong flag is said at once.
    from jem_jax import parallel, run

    path = Path(flags.workdir or f"runs/{Path(flags.config).stem}")
    cluster = parallel.Cluster(flags.coordinator_address, flags.num_processes, flags.process_id, flags.distributed)
    return run.run(flags.mode, config, path, flags.overwrite, cluster, flags.require_devices)


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


def _parser() -> Parser:
    parser = Parser(
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
    return ", ".join(sorted(config_files.packaged()))


def _quiet_libraries() -> None:
    """Keeps libraries' logs off the screen: what a person must know of them, an error of ours says in one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    entry_point()
