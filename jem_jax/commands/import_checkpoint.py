"""The command that makes a workdir of a checkpoint of the official PyTorch code.

    python -m jem_jax.import_official last_ckpt.pt --config=configs/cifar10.py --workdir=runs/official

The workdir can then be evaluated, sampled from, or trained further by `python -m jem_jax.main`. The optimiser starts
afresh, since official checkpoints hold none.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from jem_jax import datasets, torch_import
from jem_jax.commands import command_line, config_files
from jem_jax.common import paths
from jem_jax.common.errors import UserError, printable
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import processes
from jem_jax.runs import checkpoint, workdir
from jem_jax.torch_import import Imported
from jem_jax.training import network, quantities, trained
from jem_jax.training.setup import prepare


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status. Errors are those of its parts, `UserError`s."""
    flags, overrides = _parse(arguments)
    with processes.own_settings():
        return _import(flags, overrides)


def _import(flags: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    path = paths.local("--workdir", flags.workdir)
    checkpoint.check_folder(path)
    processes.start(processes.Cluster(), 1, 1)
    config = config_files.read(flags.config, overrides)
    network.look_in(config_files.find(flags.config).parent)
    conditional = quantities.buffer_classes(config, 2) > 1
    imported = torch_import.load(flags.checkpoint, flags.norm, class_conditional=conditional)
    overrides = [*overrides, *_settings(imported)]
    config = config_files.read(flags.config, overrides)
    _write_workdir(imported, config, datasets.load(config.data), path)
    if imported.buffer is None and quantities.weights(config).needs_samples:
        print("the checkpoint holds no replay buffer; its chains begin afresh")
    print(printable(f"wrote {flags.workdir}; go on with:"))
    print(printable(f"  {_next_command(flags.config, flags.workdir, overrides)}"))
    return 0


def _next_command(config: str, workdir: str, overrides: Sequence[tuple[str, str]]) -> str:
    """The command that evaluates the run, quoted for a shell."""
    flags = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{name}={text}" for name, text in overrides)]
    return f"python -m jem_jax.main --mode=evaluate {shlex.join(flags)}"


def _settings(imported: Imported) -> list[tuple[str, str]]:
    """The settings that a checkpoint decides, as overrides of a config file."""
    model = imported.model
    settings = [("model.depth", model.depth), ("model.width", model.width), ("model.norm", model.norm)]
    if imported.buffer is not None:
        slots, classes = imported.buffer.shape[:2]
        settings.append(("sampler.buffer_size", slots * classes))
    return [(name, str(value)) for name, value in settings]


def _write_workdir(imported: Imported, config: Config, dataset: Dataset, path: Path) -> None:
    """Writes a workdir whose only checkpoint, of iteration 0, is an imported model."""
    _check(imported, dataset)
    setup = prepare(config, dataset)
    setup.data.close()
    state, buffer = setup.begin()
    state = trained.with_variables(state, imported.variables)
    if buffer is not None and imported.buffer is not None:
        buffer = jnp.asarray(imported.buffer)
    with workdir.held(path):
        workdir.prepare_empty(path)
        workdir.write_facts(path, workdir.facts_of(config, dataset, 0))
        checkpoints = checkpoint.Checkpoints(path / workdir.CHECKPOINTS, config.training.keep_checkpoints)
        checkpoints.save(0, trained.tree(checkpoint.to_tree(state), buffer), {"best_accuracy": -1.0, "seconds": 0.0})
        checkpoints.close()


def _check(imported: Imported, dataset: Dataset) -> None:
    if imported.model.num_classes != dataset.num_classes:
        raise UserError(
            f"the checkpoint has {imported.model.num_classes} classes and data set {dataset.name} "
            f"{dataset.num_classes}; name the data it was trained on with --config"
        )
    channels = imported.variables["params"]["conv1"]["kernel"].shape[2]
    shape = (*dataset.image_shape[:2], channels) if imported.buffer is None else imported.buffer.shape[2:]
    if shape != dataset.image_shape:
        raise UserError(f"the checkpoint is of images {shape} and data set {dataset.name} of {dataset.image_shape}")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = command_line.Parser(
        prog="python -m jem_jax.import_official",
        description="Makes a workdir of a checkpoint of the official PyTorch code.",
        epilog="--config.group.key=value overrides a setting, as for python -m jem_jax.main",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the .pt file")
    parser.add_argument("--config", required=True, metavar="FILE", help="a config file for the data it was trained on")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="an empty or missing folder")
    parser.add_argument("--norm", choices=("layer", "instance"), help="needed where the file does not tell")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags, rest = parser.parse_known_args(arguments)
    return flags, command_line.overrides(parser, rest)
