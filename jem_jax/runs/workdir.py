"""A run's directory: the run that it belongs to, its files, and a lock against other programs."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jem_jax import config as configuration
from jem_jax.common import files
from jem_jax.common.errors import UserError, shown
from jem_jax.config import Config
from jem_jax.datasets.dataset import Dataset
from jem_jax.datasets.notices import say
from jem_jax.runs import checkpoint, image_grid, metrics

RUN_FILE = "run.json"
RECOVERIES = "recoveries.json"
CHECKPOINTS, BEST, BASELINE, SAMPLES, REPORT, SET_ASIDE = (
    "checkpoints", "best", "baseline", "samples", "report", "set_aside",
)  # fmt: skip
_LOCK = ".lock"
EXPORTS = (
    "unconditional.npz",
    "by_class.npz",
    "buffer.npz",
    "unconditional/[0-9]*.png",
    "by_class/[0-9]*.png",
    "buffer/[0-9]*.png",
)
"""patterns of an export's files"""
_WRITTEN = (
    RECOVERIES,
    metrics.FILE,
    "tensorboard/events.out.tfevents.*",
    *(f"{SAMPLES}/export/{pattern}" for pattern in EXPORTS),
    f"{REPORT}/report.*",
    f"{REPORT}/sections/*.json",
    ".*.partial",
    "*/.*.partial",
)
"""patterns of a run's files other than checkpoints and pictures"""
_COMPARED = ("data", "model", "sampler", "objective", "optimizer", "schedule", "seed")
_LOCATIONS = ("data.place", "data.data_dir", "data.manual_dir")
"""settings that do not change any result"""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that later programs need besides its checkpoints."""

    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    cpu_devices: int
    """how many devices the CPU was made into; 0 on an accelerator"""
    fingerprint: str = ""
    """`Dataset.fingerprint` of the data; empty in runs of versions that did not record it"""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)


def facts_of(config: Config, dataset: Dataset, cpu_devices: int) -> RunFacts:
    """The facts of a run of these settings on this data."""
    return RunFacts(config, dataset.image_shape, dataset.class_names, cpu_devices, dataset.fingerprint)


def find_facts(path: Path) -> RunFacts | None:
    """The facts of the run in a workdir, or None where there is no run. Errors are those of `read_facts`."""
    return read_facts(path) if (path / RUN_FILE).exists() else None


def read_facts(path: Path) -> RunFacts:
    """The facts of the run in a workdir.

    Raises:
      UserError: there is no run, or its run.json is damaged.
    """
    file = path / RUN_FILE
    if not file.exists():
        raise UserError(f"{path} holds no run (there is no {RUN_FILE}); train one first, or name it with --workdir")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return RunFacts(
            config=configuration.stored(facts["config"]),
            image_shape=tuple(facts["image_shape"]),
            class_names=tuple(facts["class_names"]),
            cpu_devices=int(facts["cpu_devices"]),
            fingerprint=str(facts.get("data", {}).get("fingerprint", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it, or start anew with --overwrite") from error


def write_facts(path: Path, facts: RunFacts) -> None:
    """Writes run.json whole or not at all."""
    values = {
        "config": configuration.as_dict(facts.config),
        "image_shape": facts.image_shape,
        "class_names": facts.class_names,
        "cpu_devices": facts.cpu_devices,
        "data": {"fingerprint": facts.fingerprint},
    }
    files.write_json(path / RUN_FILE, values)


@contextmanager
def held(path: Path, writes: bool = True) -> Iterator[None]:
    """Holds the workdir, which is made if missing, for this program alone.

    Args:
      writes: whether this is the one process of its run that does; others hold nothing.

    Raises:
      UserError: it cannot be written, or another program holds it.
    """
    if not writes:
        yield
        return
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"workdir {shown(str(path))} is no Unicode text (UTF-8); name another with --workdir"
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.held(path / _LOCK))
        except BlockingIOError as error:
            raise UserError(
                f"workdir {path} is in use by another run; wait for it, or name another with --workdir"
            ) from error
        except OSError as error:
            raise UserError(
                f"workdir {path} cannot be written: {error.strerror}; name another with --workdir"
            ) from error
        yield


def is_writable(path: Path) -> bool:
    """Whether this user may write and hold a workdir: a colleague's lock may not be ours in a folder that is."""
    lock = path / _LOCK
    return os.access(path, os.W_OK) and (not lock.exists() or os.access(lock, os.W_OK))


def prepare(path: Path, facts: RunFacts, overwrite: bool, trains: bool = True, writes: bool = True) -> None:
    """Makes sure that a run of these settings and this data may work in a workdir.

    The data are compared by content, so their name may change. Modes that do not train accept other data of that name.

    Raises:
      UserError: it holds a run of other settings or on other data, or files that are not a run's.
    """
    if not writes:
        return
    if overwrite and (path / RUN_FILE).exists():
        _clear(path)
        return
    foreign = _entries(path)
    if not foreign:
        return
    if RUN_FILE not in foreign:
        raise UserError(
            f"workdir {path} holds {foreign[0]!r} but no run ({RUN_FILE} is missing); name an empty one with --workdir"
        )
    there = read_facts(path)
    remedy = "Name another with --workdir, or start anew with --overwrite"
    _check_same(f"workdir {path} holds a run", there, facts, remedy, trains=trains)
    if not there.fingerprint:
        say(f"{path / RUN_FILE} does not say which data it is of; noted: {shown(facts.config.data.name)} as it is now")
        write_facts(path, dataclasses.replace(there, fingerprint=facts.fingerprint))


def check_reading(path: Path, there: RunFacts, here: RunFacts, but: tuple[str, ...] = ()) -> None:
    """Makes sure that a folder that is only read holds a model of these settings, and of such images.

    Args:
      but: settings that may differ: "data.name".

    Raises:
      UserError: it does not, with all that differ.
    """
    _check_same(f"{path} is", there, here, "Leave --config out, and they are its own", but)


def _check_same(
    what: str, there: RunFacts, here: RunFacts, remedy: str, but: tuple[str, ...] = (), trains: bool = False
) -> None:
    differences = list(_differences(there, here, but))
    if differences:
        raise UserError(f"{what} of other settings: {'; '.join(differences)}. {remedy}")
    changed = _changed_data(there, here)
    shapes_fit = (there.image_shape, there.num_classes) == (here.image_shape, here.num_classes)
    if changed and (trains or not shapes_fit):
        raise UserError(
            f"{what} of other data: {changed}. Name such data as its own with --config.data.name, or another folder "
            "with --workdir"
        )
    if changed:
        say(f"{what} of other data: {changed}; what follows is of the data as they are now")


def _changed_data(there: RunFacts, here: RunFacts) -> str:
    """The difference of the data from those of the run, in words; empty if there is none."""
    name = shown(here.config.data.name)
    if there.image_shape != here.image_shape:
        return f"images of {name} are {list(here.image_shape)}, those of the run {list(there.image_shape)}"
    if there.class_names != here.class_names:
        ours, theirs = (shown(", ".join(facts.class_names))[1:-1] for facts in (here, there))
        return f"classes of {name} are {ours}; those of the run {theirs}"
    if there.fingerprint and there.fingerprint != here.fingerprint:
        return f"images or labels of {name} have changed since"
    return ""


def prepare_empty(path: Path) -> None:
    """Makes sure that a workdir is empty.

    Raises:
      UserError: it is not.
    """
    entries = _entries(path)
    if entries:
        raise UserError(f"workdir {path} is not empty ({entries[0]}); name an empty or missing one with --workdir")


def prepare_reports(path: Path, writes: bool = True) -> None:
    """Makes sure that a folder for another folder's reports and samples holds nothing else.

    Raises:
      UserError: it holds a run, whose report would be lost, or other files.
    """
    other = [name for name in _entries(path) if name not in (REPORT, SAMPLES)] if writes else []
    if other:
        raise UserError(f"folder {path} holds {other[0]!r}; name an empty or missing one with --report_dir")


def _entries(path: Path) -> list[str]:
    """Names of the entries of a folder, without logs and without the files that systems leave in every folder."""
    return sorted(entry.name for entry in path.iterdir() if not files.is_litter(entry) and not files.is_log(entry))


def _differences(there: RunFacts, here: RunFacts, but: tuple[str, ...] = ()) -> Iterator[str]:
    old, new = _compared(there.config), _compared(here.config)
    # The same content can lie in several places, and a path has several spellings.
    if there.fingerprint and there.fingerprint == here.fingerprint:
        del old["data.name"], old["data.image_size"]
    elif _place(there.config.data.name) == _place(here.config.data.name):
        del old["data.name"]
    for name in old:
        if old[name] != new[name] and name not in but:
            yield f"{name} is {old[name]!r} there, {new[name]!r} here"
    setting = here.config.schedule.by_progress
    epochs = there.config.training.epochs, here.config.training.epochs
    if setting and epochs[0] != epochs[1]:
        yield f"training.epochs is {epochs[0]} there, {epochs[1]} here, and schedule.{setting} depends on it"


def _place(name: str) -> str:
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def _compared(config: Config) -> dict[str, Any]:
    settings = flatten_dict(configuration.as_dict(config), sep=".")
    unlabelled, labelled = config.training.batch_sizes
    return {
        name: value
        for name, value in settings.items()
        if name.partition(".")[0] in _COMPARED and name not in _LOCATIONS
    } | {
        "training.batch_size": unlabelled,
        "training.labelled_batch_size": labelled,
        "training.statistics_images": config.training.statistics_images,
        "training.init_from": _place(config.training.init_from),
    }


def _clear(path: Path) -> None:
    """Deletes a run's own files, and no others."""
    for part in (path / BASELINE, path):
        for folder in (CHECKPOINTS, BEST, SET_ASIDE):
            checkpoint.clear(part / folder)
        for picture in (file for folder in (SAMPLES, REPORT) for file in (part / folder).glob("*.png")):
            if image_grid.is_ours(picture):
                picture.unlink()
        files.remove(part, _WRITTEN)
        files.remove_empty(*(part / folder for folder in (SAMPLES, REPORT, "tensorboard")))
    files.remove_empty(path / BASELINE)
    # Last, so that an interrupted deletion can be repeated with --overwrite.
    (path / RUN_FILE).unlink()
