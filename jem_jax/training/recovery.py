"""Recovery from a divergence: the checkpoint to go back to, the changes from there, and the history.

A run goes back to the newest checkpoint that is at least `MIN_AGE` iterations older than the alarm. If it diverges
again before it has a newer one, it goes one checkpoint further back. From there it takes new random numbers. For
`DURATION` iterations it also takes a smaller learning rate and more chain steps.

The history is a small file beside the checkpoints. All that a recovery changes is a function of it and of the
iteration. Whoever opens the run next therefore finishes a recovery that was cut off, with the same result.
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
MIN_AGE = 50
"""iterations after which a checkpoint counts as good: a fault that it already had would have raised an alarm"""
DURATION = 1000
"""iterations for which the factors of a recovery hold"""
_MAX_CHAIN_FACTOR = 8.0
"""limit of the factor of chain steps, several recoveries together; more would make iterations too slow"""


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
    best_step: int
    """the best checkpoint by validation at that time, which stays, whichever branch it is of; -1: none"""
    best_accuracy: float
    seconds: float
    """that the training had taken so far"""
    settled: bool = False
    """whether the checkpoints past `back_to` were deleted"""

    def holds(self, step: int) -> bool:
        """Whether its factors hold in an iteration, counted from 0."""
        return self.back_to <= step < self.back_to + DURATION


History = tuple[Recovery, ...]


def read(directory: Path) -> History:
    """The recoveries of the training in a directory, the oldest first.

    Raises:
      UserError: the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return ()
    names = [field.name for field in dataclasses.fields(Recovery)]
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        history = tuple(Recovery(**{name: entry[name] for name in names}) for entry in entries)
        assert all(entry.reason in divergence.REASONS for entry in history), "an unknown reason"
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or start anew with --overwrite") from error
    return history


def write(directory: Path, history: History) -> None:
    """Writes the history whole or not at all."""
    files.write_json(directory / FILE, [dataclasses.asdict(entry) for entry in history])


def target(history: History, step: int, checkpoints: Sequence[int]) -> int:
    """The checkpoint to go back to: the newest that is trusted, or else the oldest good one, or else the start.

    Args:
      step: the iteration that raised the alarm, counted from 1.
      checkpoints: iterations done at each that is whole, increasing.

    Returns:
      Iterations done at that checkpoint; 0 for the start.
    """
    return max(_trusted(history, step, checkpoints), default=min(_good(step, checkpoints), default=0))


def to_keep(steps: Sequence[int], keep: int, regular: Set[int], history: History = ()) -> set[int]:
    """The checkpoints that stay: the last ones, and all since the one that a run would go back to.

    A run goes back to regular checkpoints alone, never to one that an interruption saved. Interrupted and undisturbed
    runs therefore recover alike.

    Args:
      steps: iterations done at each, increasing.
      keep: how many of the last stay at least.
      regular: those that would have been saved without an interruption too.
      history: the recoveries so far.
    """
    due = [step for step in steps if step in regular]
    trusted = _trusted(history, steps[-1], due)
    return {*steps[-keep:], *due[-keep:], *(step for step in due if not trusted or step >= trusted[-1])}


def _trusted(history: History, step: int, checkpoints: Sequence[int]) -> list[int]:
    """Good checkpoints, but for those between the last recovery's start and its alarm: the run diverged from there."""
    good = _good(step, checkpoints)
    return [done for done in good if not (history and history[-1].back_to <= done < history[-1].step)]


def _good(step: int, checkpoints: Sequence[int]) -> list[int]:
    return [done for done in checkpoints if done <= step - MIN_AGE]


def learning_rate_factor(history: History, step: int) -> float:
    """The factor of an iteration's learning rate."""
    return math.prod(entry.learning_rate_factor for entry in history if entry.holds(step))


def chain_steps(num_steps: int, history: History, step: int) -> int:
    """How many SGLD steps the chains of an iteration take."""
    factors = [entry.chain_steps_factor for entry in history if entry.holds(step)]
    return round(num_steps * min(math.prod(factors), max(_MAX_CHAIN_FACTOR, *factors, 1.0)))


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
    for path in checkpoint.folders(folder):
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


def events(history: History) -> list[dict[str, Any]]:
    """The records of the recoveries in metrics.jsonl and the report."""
    told = ("reason", "back_to", "learning_rate_factor", "chain_steps_factor")
    return [
        {"recovery": number, "diverged_at": entry.step} | {name: getattr(entry, name) for name in told}
        for number, entry in enumerate(history, 1)
    ]


def in_words(entry: Recovery) -> str:
    """A recovery in a line."""
    start = f"the checkpoint of iteration {entry.back_to}" if entry.back_to else "the start"
    return (
        f"diverged at iteration {entry.step} ({divergence.REASONS[entry.reason]}); back to {start} with new random "
        f"numbers and, for {DURATION} iterations, {entry.learning_rate_factor:g} times the learning rate and "
        f"{entry.chain_steps_factor:g} times the chain steps"
    )


def final(alarm: divergence.Alarm, history: History) -> dict[str, Any]:
    """The record, in metrics.jsonl and the report, of a divergence that ended the run."""
    return {"diverged_at": alarm.step + 1, "reason": alarm.reason, "recoveries": len(history), "ended": True}


def end(directory: Path) -> dict[str, Any] | None:
    """`final` of the training in a directory, if it ended so and did not go on since."""
    lines = metrics.read(directory / metrics.FILE)
    last: dict[str, Any] = lines[-1] if lines else {}
    names = final(divergence.Alarm("", 0), ()).keys()
    if not names <= last.keys() or last["reason"] not in divergence.REASONS:
        return None
    return {name: last[name] for name in names}


def end_in_words(end: dict[str, Any]) -> str:
    """`final` in a line of text."""
    return (
        f"diverged at iteration {end['diverged_at']} ({divergence.REASONS[end['reason']]}) after {end['recoveries']} "
        "recoveries, and no more were allowed"
    )


def exhausted(alarm: divergence.Alarm, history: History, last: int | None) -> UserError:
    """The error of a run that has diverged once too often.

    Args:
      last: iterations done at its last checkpoint, or None.
    """
    left = f"the checkpoint of iteration {last} is kept" if last else "there is no checkpoint yet"
    text = f"training diverged at iteration {alarm.step + 1}: {divergence.REASONS[alarm.reason]}; {left}. "
    if history:
        past = "; ".join(
            f"({number}) {entry.reason} at {entry.step}, back to {entry.back_to}"
            for number, entry in enumerate(history, 1)
        )
        text += f"Its {len(history)} recoveries (config.recovery.max_recoveries) are used up: {past}. "
    return UserError(text + "A smaller learning rate or step size, or more SGLD steps, may help")
