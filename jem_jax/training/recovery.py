"""What is done about a divergence: where a run goes back to, what it does otherwise from there, and the history of it.

The history is a small file beside the checkpoints, and all that a recovery changes is a function of it and of the
iteration. A recovery that was cut off anywhere is therefore finished by whoever opens the run next, as if nothing had
come between.
"""

import dataclasses
import json
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jem_jax import prng
from jem_jax.common import files
from jem_jax.common.errors import UserError
from jem_jax.runs import checkpoint, metrics, workdir
from jem_jax.training import divergence

Array = jax.Array

FILE = workdir.RECOVERIES
_MOST_TIMES = 8.0
"""the chain steps, of several recoveries together"""


@dataclass(frozen=True)
class Recovery:
    """A divergence, and what was done about it."""

    reason: str
    """one of `divergence.REASONS`"""
    step: int
    """the iteration that raised the alarm, counted from 1"""
    back_to: int
    """iterations done at the checkpoint that the run went back to; 0: it began anew"""
    learning_rate_factor: float
    chain_steps_factor: float
    iterations: int
    """for how many from `back_to` on the two factors hold"""
    buffer: str
    """"restore" or "fresh" """
    best_step: int
    """the best checkpoint by validation at that time, which stays, whichever branch it is of; -1: none"""
    best_accuracy: float
    seconds: float
    """that the training had taken so far"""
    settled: bool = False
    """whether what lies past `back_to` was deleted"""

    def holds(self, step: int) -> bool:
        """Whether its factors hold in an iteration, counted from 0."""
        return self.back_to <= step < self.back_to + self.iterations

    def failed(self, step: int) -> bool:
        """Whether a divergence in an iteration, counted from 1, shows that going back had not been far enough.

        It had been if the run then came as far past the iteration that it had diverged at as it had gone back from it.
        """
        return step < self.step + (self.step - self.back_to)

    def doubts(self, checkpoint_step: int) -> bool:
        """Whether a checkpoint lies between where the run went back to and where it had diverged."""
        return self.back_to <= checkpoint_step < self.step


History = tuple[Recovery, ...]


def read(directory: Path) -> History:
    """The recoveries of the training in a directory, the oldest first.

    Raises:
      UserError: the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return ()
    fields = dataclasses.fields(Recovery)
    try:
        history = tuple(Recovery(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
        for entry in history:
            for field in fields:
                assert isinstance(field.type, type)
                if not isinstance(getattr(entry, field.name), (int, float) if field.type is float else field.type):
                    raise ValueError(f"{field.name} is not a {field.type.__name__}")
            if entry.reason not in divergence.REASONS:
                raise ValueError(f"{entry.reason!r} is no reason")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or start anew with --overwrite") from error
    return history


def write(directory: Path, history: History) -> None:
    """Writes the history whole or not at all."""
    text = json.dumps([dataclasses.asdict(entry) for entry in history], indent=1)
    with files.whole(directory / FILE) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def target(history: History, step: int, checkpoints: Sequence[int], proof: int) -> int:
    """The checkpoint to go back to: the newest that has proved good, and from which no recovery has failed.

    A fault grows before it raises an alarm, and is in checkpoints of that time. One from which, or from close after
    which, a run diverged again is therefore not taken twice: each failed recovery leads further back. Where all that
    are left are such, the oldest of them is taken again, with other random numbers and the factors of one recovery
    more; where none has proved good, the start.

    Args:
      step: the iteration that raised the alarm, counted from 1.
      checkpoints: iterations done at each that is whole, increasing.
      proof: iterations that must have followed a checkpoint for it to have proved good.

    Returns:
      Iterations done at that checkpoint; 0 for the start.
    """
    good = [one for one in checkpoints if one <= step - proof]
    failed = [entry for entry in history if entry.failed(step)]
    trusted = [one for one in good if not any(entry.doubts(one) for entry in failed)]
    return max(trusted, default=min(good, default=0))


def kept(steps: Sequence[int], keep: int, proof: int, due: Set[int], history: History = ()) -> set[int]:
    """Which checkpoints are kept: the last ones, all since the last that has proved good, and what a failed recovery
    would go back to.

    A checkpoint has proved good when `proof` iterations went by after it, since a fault that it already had would have
    raised an alarm by then. A run goes back to checkpoints that were due alone, never to what an interruption saved, so
    that interrupted and undisturbed runs recover alike.

    Args:
      steps: iterations done at each, increasing.
      keep: how many of the last.
      proof: how many those are.
      due: those that would have been saved without an interruption too.
      history: while a recovery could still fail, nothing older than where it went back to is deleted.
    """
    regular = [step for step in steps if step in due]
    proved = [step for step in regular if step <= regular[-1] - proof]
    since = [step for step in regular if not proved or step >= proved[-1]]
    recoveries = [entry for entry in history if entry.failed(steps[-1])]
    older = [step for step in regular if any(step <= entry.back_to for entry in recoveries)]
    return {*steps[-keep:], *regular[-keep:], *since, *older}


def learning_rate_factor(history: History, step: int) -> float:
    """What the learning rate of an iteration is multiplied by."""
    factor = 1.0
    for entry in history:
        factor *= entry.learning_rate_factor if entry.holds(step) else 1.0
    return factor


def chain_steps(num_steps: int, history: History, step: int) -> int:
    """How many SGLD steps the chains of an iteration take."""
    factors = [entry.chain_steps_factor for entry in history if entry.holds(step)]
    # Many times as many would not end a run, but make it stand still.
    return round(num_steps * min(math.prod(factors), max(_MOST_TIMES, *factors, 1.0)))


def key(run_key: Array, number: int) -> Array:
    """The PRNG key that a run goes on with after its n-th recovery, n ≥ 1."""
    return jax.random.fold_in(prng.stream(run_key, "recovery"), number)


def settle(directory: Path, folder: Path, history: History) -> History:
    """Finishes the last recovery if that was cut off: deletes the checkpoints past the one that it went back to.

    Args:
      directory: the training's.
      folder: its checkpoints'.
    """
    if not history or history[-1].settled:
        return history
    for path in checkpoint.found(folder):
        if int(path.name) > history[-1].back_to:
            checkpoint.remove(path)
    history = settled(history)
    write(directory, history)
    return history


def settled(history: History) -> History:
    """The history once its last recovery is finished."""
    return (*history[:-1], dataclasses.replace(history[-1], settled=True)) if history else history


def sound_checkpoints(folder: Path) -> list[int]:
    """Iterations done at each checkpoint that a run may go back to, increasing; damaged ones are left out."""
    return [step for step in sorted(checkpoint.regular(folder)) if checkpoint.damage(folder / str(step)) is None]


def event(history: History, number: int) -> dict[str, Any]:
    """What metrics.jsonl and the report hold of the n-th recovery, n ≥ 1."""
    entry = dataclasses.asdict(history[number - 1])
    told = ("reason", "back_to", "learning_rate_factor", "chain_steps_factor", "iterations", "buffer")
    return {"recovery": number, "diverged_at": entry["step"]} | {name: entry[name] for name in told}


def events(history: History) -> list[dict[str, Any]]:
    """`event` of every recovery."""
    return [event(history, number + 1) for number in range(len(history))]


def in_words(entry: Recovery) -> str:
    """A recovery in a line."""
    where = f"the checkpoint of iteration {entry.back_to}" if entry.back_to else "the start"
    changes = ["new random numbers"]
    if entry.learning_rate_factor != 1:
        changes.append(f"{entry.learning_rate_factor:g} times the learning rate")
    if entry.chain_steps_factor != 1:
        changes.append(f"{entry.chain_steps_factor:g} times the chain steps")
    if len(changes) > 1:
        changes[-1] += f" for {entry.iterations} iterations"
    if entry.buffer == "fresh":
        changes.append("a fresh buffer")
    return f"diverged at iteration {entry.step} ({divergence.REASONS[entry.reason]}); back to {where} with " + (
        ", ".join(changes)
    )


def final(alarm: divergence.Alarm, history: History) -> dict[str, Any]:
    """What metrics.jsonl and the report hold of a divergence that ended the run."""
    return {"diverged_at": alarm.step + 1, "reason": alarm.reason, "recoveries": len(history), "ended": True}


def end(directory: Path) -> dict[str, Any] | None:
    """`final` of the training in a directory, if it ended so and did not go on since."""
    lines = metrics.read(directory / metrics.FILE)
    last: dict[str, Any] = lines[-1] if lines else {}
    wanted = final(divergence.Alarm("", 0), ())
    if not last.get("ended") or last.get("reason") not in divergence.REASONS or not wanted.keys() <= last.keys():
        return None
    return {name: last[name] for name in wanted}


def end_in_words(end: dict[str, Any]) -> str:
    """That in a line."""
    return (
        f"diverged at iteration {end['diverged_at']} ({divergence.REASONS[end['reason']]}) after {end['recoveries']} "
        "recoveries, and no more were allowed"
    )


def exhausted(alarm: divergence.Alarm, history: History, last: int | None) -> UserError:
    """What a run ends with that has diverged once too often.

    Args:
      last: iterations done at its last checkpoint, or None.
    """
    is_kept = f"the checkpoint of iteration {last} is kept" if last else "there is no checkpoint yet"
    text = f"training diverged at iteration {alarm.step + 1}: {divergence.REASONS[alarm.reason]}; {is_kept}. "
    if history:
        past = "; ".join(
            f"({number}) {entry.reason} at {entry.step}, back to {entry.back_to}"
            for number, entry in enumerate(history, 1)
        )
        text += f"Its {len(history)} recoveries (config.recovery.max_recoveries) are used up: {past}. "
    return UserError(text + "A smaller learning rate or step size, or more SGLD steps, may help")
