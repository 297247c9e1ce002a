"""Checkpoints: Orbax writes them, a SHA-256 manifest says that what is read back is what was written.

Orbax commits a checkpoint atomically but does not notice a byte that changed afterwards. A manifest of every file's
hash is therefore written after the commit and checked before a restore; a checkpoint without one was never finished.

A checkpoint's tree holds plain host arrays and the whole replay buffer [S, C, H, W, channels], so that any number of
devices or processes can read it.
"""

import contextlib
import fnmatch
import functools
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jem_jax.common import files
from jem_jax.common.errors import UserError, first_line, shown

_MANIFEST = "manifest.json"
_NAME = re.compile(r"([a-z]+-)?\d+(-\d+)?")
_ORBAX_PARTIAL = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
_WAY_OUT = "restore it from a copy, or start anew with --overwrite"


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read back."""

    step: int
    tree: Any
    note: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one directory, each under its step; saved in the background.

    Args:
      directory: made if missing.
      keep: how many of the last stay.
      writes: whether this process writes manifests (the first one does).
      to_keep: instead of `keep`, a function of all steps, increasing, and of the regular ones, that gives those that
        stay after a save.
      after: other checkpoints, which these refer to. What was saved there before is whole before a save here is.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        writes: bool = True,
        to_keep: Callable[[Sequence[int], Set[int]], set[int]] | None = None,
        after: "Checkpoints | None" = None,
    ) -> None:
        self._directory, self._writes, self._after = directory, writes, after
        self._only: set[int] = set()
        self._regular = regular(directory)
        choose = to_keep or (lambda steps, _: set(steps[-keep:]))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Retention(lambda steps: self._only or choose(steps, self._regular)),
            create=True,
            cleanup_tmp_directories=True,
            # Two of them save side by side, and processes must not take a barrier of one for the other's.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._finishing: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tree: Any, note: dict[str, Any], is_regular: bool = True) -> None:
        """Starts to save; the arrays may be donated or overwritten afterwards.

        Args:
          step: the checkpoint's name.
          tree: nested dicts of arrays.
          note: JSON beside it.
          is_regular: whether it was due, and not saved for an interruption alone. The manifest records it, since the
            settings that say what is due may change.

        Raises:
          UserError: this save, or the one before, could not be written.
        """
        self.finish()
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(note))
        (self._regular.add if is_regular else self._regular.discard)(step)
        try:
            self._manager.save(step, args=arguments, force=True)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        # The save in progress there; it may start a later one before this one is finished.
        other = self._after._finishing if self._after else None
        finishing = functools.partial(self._finish, step, is_regular, other)
        self._finishing = threading.Thread(target=finishing, name="checkpoint-manifest")
        self._finishing.start()

    def replace(self, step: int, tree: Any, note: dict[str, Any]) -> None:
        """`save` that deletes all others, also a later one or one of that number, of a branch that a recovery left.

        Errors are those of `save`.
        """
        self.finish()
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._only = {step}
        self.save(step, tree, note)

    def finish(self) -> None:
        """Waits until what was saved is whole.

        Raises:
          UserError: it could not be written.
        """
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failed(error) from error

    def close(self) -> None:
        """Finishes, and frees Orbax's threads."""
        try:
            self.finish()
        finally:
            # It could only raise the error of a failed save once more.
            with contextlib.suppress(Exception):
                self._manager.close()

    def _finish(self, step: int, is_regular: bool, other: threading.Thread | None) -> None:
        try:
            self._manager.wait_until_finished()
            if other is not None:
                other.join()
            if self._writes:
                _write_manifest(self._directory / str(step), is_regular)
        except BaseException as error:
            self._error = error

    def _failed(self, error: BaseException) -> UserError:
        full = "No space left" in str(error)
        reason = "no space left on the device" if full else first_line(error)[:200]
        return UserError(f"no checkpoint could be written to {self._directory} ({reason}); earlier ones are kept")


class _Retention(preservation_policy.PreservationPolicy):
    """Tells Orbax which checkpoints stay."""

    def __init__(self, to_keep: Callable[[Sequence[int]], set[int]]) -> None:
        self._to_keep = to_keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        to_keep = self._to_keep(sorted(steps))
        return [step in to_keep for step in steps]


def check_folder(folder: Path) -> None:
    """Makes sure that checkpoints can be saved below a folder.

    Orbax looks for its parts by a pattern that begins with the folder's path, and TensorStore takes \\ for /: a save
    would end without an error and hold nothing.

    Raises:
      UserError: the path holds brackets that mean other characters, or a backslash.
    """
    path = str(folder.absolute())
    if "\\" in path or not fnmatch.fnmatchcase(path, path):
        raise UserError(
            f"no checkpoint can be saved or read below {shown(path)}, since it holds [ and ], or a backslash; use a "
            "workdir without them"
        )


def restore(directory: Path, template: Any, step: int | None = None, checked: bool = False) -> Restored:
    """Reads a checkpoint back as host arrays, after its manifest was checked.

    Args:
      directory: of the run's checkpoints.
      template: a tree of the expected structure, of arrays or `ShapeDtypeStruct`s. Of one with a sharding, this process
        reads what its devices hold.
      step: which; the newest finished one by default.
      checked: its manifest was checked already, which takes reading all of it.

    Raises:
      UserError: there is none, it is damaged, or it holds another structure (a foreign checkpoint); or its path holds a
        backslash.
    """
    if "\\" in str(directory.absolute()):
        check_folder(directory)
    finished = steps(directory)
    if not finished:
        raise UserError(f"{directory} holds no finished checkpoint")
    step = finished[-1] if step is None else step
    path = directory / str(step)
    fault = None if checked else damage(path)
    if fault:
        raise UserError(f"checkpoint {path} is damaged: {fault}; {_WAY_OUT}")
    is_cut = lambda leaf: getattr(leaf, "sharding", None) is not None  # noqa: E731
    expected = jax.tree.map(lambda leaf: leaf if is_cut(leaf) else np.zeros(leaf.shape, leaf.dtype), template)
    arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(expected), note=ocp.args.JsonRestore())
    handler = ocp.CompositeCheckpointHandler(tree=ocp.StandardCheckpointHandler(), note=ocp.JsonCheckpointHandler())
    here = jax.process_index()
    # Without waiting for the other processes.
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        # Dtypes too, which Orbax would cast.
        differs = difference(expected, reader.metadata(path.absolute()).item_metadata["tree"])
        if differs:
            raise UserError(f"checkpoint {path} is not one of this run's network and buffer: it {differs}; {_WAY_OUT}")
        items = reader.restore(path.absolute(), args=arguments)
    return Restored(step, items["tree"], items["note"])


def steps(directory: Path) -> list[int]:
    """The steps of the finished checkpoints, in order."""
    return sorted(int(path.name) for path in folders(directory) if (path / _MANIFEST).exists())


def regular(directory: Path) -> set[int]:
    """The steps of the finished checkpoints that were due."""
    manifests = {step: _manifest(directory / str(step)) for step in steps(directory)}
    return {step for step, manifest in manifests.items() if manifest is not None and manifest.get("regular") is True}


def newest_whole(directory: Path) -> tuple[int | None, dict[Path, str]]:
    """The step of the newest whole checkpoint, and what is wrong with every one that is unfinished or newer.

    Returns:
      The step, None where no checkpoint was ever finished, and {path: fault}.

    Raises:
      UserError: there are finished checkpoints, and all of them are damaged.
    """
    faults = dict.fromkeys(unfinished(directory), "it was never finished")
    finished = steps(directory)
    for step in reversed(finished):
        path = directory / str(step)
        fault = damage(path)
        if fault is None:
            return step, faults
        faults[path] = fault
    if finished:
        path = directory / str(finished[-1])
        raise UserError(f"checkpoint {path} is damaged ({faults[path]}) and no whole one is left; {_WAY_OUT}")
    return None, faults


def unfinished(directory: Path) -> list[Path]:
    """Checkpoints without a manifest: a run was cut off while it wrote them."""
    return [path for path in folders(directory) if not (path / _MANIFEST).exists()]


def remove(path: Path) -> None:
    """Deletes a checkpoint's files; others that lie among them are left, in a folder out of the next one's way."""
    manifest = _manifest(path)
    for file in _files(path):
        if manifest is None or str(file.relative_to(path)) in manifest["sha256"]:
            file.unlink()
    (path / _MANIFEST).unlink(missing_ok=True)
    inner = (below for below in path.rglob("*") if below.is_dir() and not files.is_litter(below))
    files.remove_empty(*sorted(inner, reverse=True), path)
    if path.exists():
        path.rename(_free(path.with_name(f"{path.name}.not_ours")))


def clear(directory: Path) -> None:
    """Deletes all checkpoints, finished or not or set aside, and what Orbax left of one that was cut off."""
    for path in list(directory.iterdir()) if directory.is_dir() else ():
        if _ORBAX_PARTIAL.fullmatch(path.name) or (_NAME.fullmatch(path.name) and _is_checkpoint(path)):
            remove(path)
    files.remove(directory, [f".*.{_MANIFEST}"])
    files.remove_empty(directory)


def set_aside(path: Path, folder: Path) -> Path:
    """Moves a checkpoint that is not whole into a folder, where it is out of the way but not lost."""
    target = _free(folder / f"{path.parent.name}-{path.name}")
    folder.mkdir(parents=True, exist_ok=True)
    # Checkpoints may lie on another disk, behind a symbolic link.
    shutil.move(path, target)
    return target


def _free(path: Path) -> Path:
    """The path, or with a number behind it where there is something already."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not os.path.lexists(free))


def folders(directory: Path) -> list[Path]:
    """The folders of checkpoints, finished or not. A user's own folder may have a number for a name."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if path.name.isdecimal() and _is_checkpoint(path)]


def _is_checkpoint(path: Path) -> bool:
    return any((path / mark).exists() for mark in (_MANIFEST, "_CHECKPOINT_METADATA", "tree"))


def damage(path: Path) -> str | None:
    """The fault of a checkpoint's files, or None. Files that were added later do not count."""
    manifest = _manifest(path)
    if manifest is None:
        return f"its {_MANIFEST} cannot be read"
    expected = manifest["sha256"]
    try:
        for name in sorted(expected):
            if not (path / name).is_file():
                return f"{name} is missing"
            if files.sha256(path / name) != expected[name]:
                return f"{name} is not what was written"
    except OSError as error:  # a failing disk
        return f"its files cannot be read ({error.strerror})"
    return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["sha256"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def to_tree(state: Any) -> Any:
    """A pytree of NamedTuples as nested dicts of host arrays, its PRNG keys as their uint32 data."""
    return flax.serialization.to_state_dict(jax.tree.map(np.asarray, jax.device_get(_unwrapped(state))))


def from_tree(template: Any, tree: Any) -> Any:
    """The inverse of `to_tree`, into the structure of `template`."""
    state = flax.serialization.from_state_dict(jax.eval_shape(_unwrapped, template), tree)
    return jax.tree.map(
        lambda like, leaf: jax.random.wrap_key_data(leaf) if _is_key(like) else np.asarray(leaf), template, state
    )


def template_of(state: Any) -> Any:
    """The tree that `to_tree` would give, as shapes alone."""
    shapes = jax.eval_shape(_unwrapped, state)
    return flax.serialization.to_state_dict(shapes)


def _unwrapped(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def difference(expected: Any, other: Any, with_dtypes: bool = True) -> str | None:
    """The difference of a tree of arrays from the expected one, such as "lacks params/bias"; None if there is none."""
    ours, theirs = (_described(tree, with_dtypes) for tree in (expected, other))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            return f"lacks {name}"
        if name not in ours:
            return f"holds {name}, which this run has not"
        if ours[name] != theirs[name]:
            return f"holds {name} as {theirs[name]}; this run's is {ours[name]}"
    return None


def _described(tree: Any, with_dtypes: bool) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {
        name: f"{leaf.dtype if with_dtypes else ''} {tuple(leaf.shape)}"
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if hasattr(leaf, "shape")
    }


def _files(path: Path) -> Iterator[Path]:
    """The files that Orbax wrote, none of which is hidden. Other programs may have added hidden ones."""
    every = (file for file in sorted(path.rglob("*")) if file.is_file() and not files.is_litter(file))
    return (file for file in every if file.name != _MANIFEST)


def _write_manifest(path: Path, is_regular: bool) -> None:
    hashes = {str(file.relative_to(path)): files.sha256(file) for file in _files(path)}
    partial = path.parent / f".{path.name}.{_MANIFEST}"
    partial.write_text(json.dumps({"regular": is_regular, "sha256": hashes}, indent=1), encoding="utf-8")
    partial.replace(path / _MANIFEST)
