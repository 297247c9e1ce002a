"""What is done about a divergence: where a run goes back to, that it then trains, and that nothing can cut it off."""

import shutil
import types

import numpy as np
import pytest
import tiny
from command import metrics

from jem_jax.common.errors import UserError
from jem_jax.report import training
from jem_jax.report.result import Result
from jem_jax.runs import checkpoint, workdir
from jem_jax.training import divergence, loop, recovery
from jem_jax.training.recovery import Recovery
from jem_jax.training.setup import Setup

LAST = 20
SETTINGS = {
    "model.factory": "tiny:mlp",
    "training.epochs": 4,
    "training.log_every": 1,
    "recovery.patience": 3,
    "recovery.chain_steps_factor": 1.0,
}
"""Five iterations an epoch, and a checkpoint after each epoch."""
WILD = {**SETTINGS, "optimizer.learning_rate": 90.0, "recovery.learning_rate_factor": 0.0005}
"""Parameters of a hundred and more after the first iteration, and no fault at a rate 2000 times smaller."""


@pytest.fixture(scope="module", autouse=True)
def proof(shared_steps):
    """Checkpoints of these short runs count as good after three iterations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "MIN_AGE", 3)
        yield


def _last(directory, settings):
    return tiny.restored(directory, **settings).tree


def _history(directory):
    return [{**vars(entry), "seconds": 0} for entry in recovery.read(directory)]


def _entry(back_to, **settings):
    values = dict.fromkeys(("learning_rate_factor", "chain_steps_factor"), 1.0)
    values |= {"best_step": -1, "best_accuracy": -1.0, "seconds": 0.0}
    return Recovery(**{"reason": "gap", "step": back_to + 5, "back_to": back_to, **values, **settings})


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """A run that diverged at its first iterations and went on at a smaller learning rate."""
    directory = tmp_path_factory.mktemp("recovered")
    tiny.train(directory, **WILD)
    return directory


def test_a_run_that_diverges_trains_to_its_end_at_a_smaller_learning_rate_and_says_so(recovered):
    history, lines = recovery.read(recovered), metrics(recovered)
    assert all(entry.settled for entry in history)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, LAST + 1))
    assert max(line.get("validation_accuracy", 0) for line in lines) > 0.5
    state = _last(recovered, WILD)["state"]
    assert all(np.isfinite(leaf).all() for leaf in tiny.leaves(state).values())
    assert state["learning_rate_factor"] == pytest.approx(0.0005 ** len(history))
    first, *_ = events = [line for line in lines if "recovery" in line]
    assert [event["recovery"] for event in events] == list(range(1, len(history) + 1))
    assert (first["reason"], first["diverged_at"], first["step"]) == (history[0].reason, history[0].step, 0)
    assert recovery.in_words(history[0]).encode() in _board(recovered)


def _board(directory):
    return b"".join(path.read_bytes() for path in (directory / "tensorboard").iterdir())


@pytest.mark.parametrize("stages", [("history", "settle"), ("rewind",)])
def test_a_run_killed_in_a_recovery_ends_as_the_undisturbed_one(recovered, tmp_path, monkeypatch, stages):
    def killed(*_):
        raise tiny.Killed

    for stage in stages:
        with monkeypatch.context() as patch:
            if stage == "history":
                patch.setattr(recovery, "write", killed)
            elif stage == "settle":
                patch.setattr(recovery, "settle", lambda *_: killed() if recovery.read(tmp_path) else ())
            else:
                patch.setattr(loop.Recorder, "rewind", killed)
            with pytest.raises(tiny.Killed):
                tiny.train(tmp_path, **WILD)
    tiny.train(tmp_path, **WILD)
    assert metrics(tmp_path) == metrics(recovered)
    assert _history(tmp_path) == _history(recovered)
    assert not tiny.differing(_last(tmp_path, WILD), _last(recovered, WILD))


UNBOUND = {**SETTINGS, "training.max_log_density": 1e-9}


def test_a_divergence_that_ends_a_run_is_in_a_line_its_metrics_and_its_report(tmp_path, capsys):
    ends = (
        r"diverged at iteration 1: .*max_log_density; there is no checkpoint yet\. "
        r".*2 recoveries .*\(2\) log_density at 1, back to 0"
    )
    with pytest.raises(UserError, match=ends) as caught:
        tiny.train(tmp_path, **UNBOUND, **{"recovery.max_recoveries": 2})
    assert "\n" not in str(caught.value)
    said = [line for line in capsys.readouterr().out.splitlines() if "diverged" in line]
    assert len(said) == 2
    assert (
        "back to the start with new random numbers and, for 1000 iterations, 0.5 times the learning rate and" in said[0]
    )
    told = {"diverged_at": 1, "reason": "log_density", "recoveries": 2, "ended": True}
    assert metrics(tmp_path)[-1] == {"step": 1, **told}
    assert recovery.end(tmp_path) == told
    assert b"Its 2 recoveries" in _board(tmp_path)
    result = Result()
    training._tell_recoveries(result, types.SimpleNamespace(path=tmp_path, models={"jem": None}))
    assert result.models == {"jem": {"ended": told}}
    first, _, last = (block["text"] for block in result.blocks)
    assert first.startswith("Recovery 1 of the JEM: it diverged at iteration 1")
    assert last.startswith("The training of the JEM ended there: it diverged at iteration 1 (|log p~| passed")
    assert last.endswith(" after 2 recoveries, and no more were allowed.")
    # The same run with other limits goes on, and is no longer one that ended so.
    tiny.train(tmp_path, **{**SETTINGS, "training.epochs": 1})
    assert recovery.end(tmp_path) is None
    assert metrics(tmp_path)[-1]["step"] == 5


def test_a_healthy_run_raises_no_alarm_and_what_proved_good_stays_so_where_later_settings_save_otherwise(tmp_path):
    tiny.train(tmp_path, **SETTINGS, **{"training.keep_checkpoints": 4})
    assert recovery.read(tmp_path) == ()
    assert sorted(checkpoint.regular(tmp_path / "checkpoints")) == [5, 10, 15, 20]
    # Neither twenty nor any before is due by these.
    later = {"training.epochs": 9, "training.checkpoint_every": 7, "recovery.max_recoveries": 1}
    with pytest.raises(UserError, match=r"\(1\) log_density at 21, back to 15"):
        tiny.train(tmp_path, **UNBOUND | later)
    assert 15 in checkpoint.steps(tmp_path / "checkpoints")


def test_a_divergence_later_goes_back_to_a_checkpoint_and_takes_more_chain_steps(recovered, tmp_path, monkeypatch):
    directory = shutil.copytree(recovered, tmp_path / "copy")
    before, past = _last(directory, WILD), len(recovery.read(directory))
    wanted = {
        **WILD, "training.epochs": 5, "recovery.max_recoveries": past + 1,
        "recovery.chain_steps_factor": 2.0, "recovery.learning_rate_factor": 1.0,
    }  # fmt: skip
    looks = iter([None, None, divergence.Alarm("log_density", step=22)])
    monkeypatch.setattr(divergence, "alarm", lambda _: next(looks, None))
    built, step = [], Setup.step
    monkeypatch.setattr(Setup, "step", lambda setup, program: built.append(program) or step(setup, program))
    tiny.train(directory, **wanted)
    assert list(dict.fromkeys(program.num_steps for program in built)) == [3, 6]
    last = recovery.read(directory)[-1]
    assert (last.step, last.back_to, last.chain_steps_factor, last.settled) == (23, 20, 2.0, True)
    assert last.best_step > 0
    after = _last(directory, WILD)
    assert int(after["state"]["step"]) == 25
    assert tiny.differing(before["state"]["key"], after["state"]["key"])


def test_checkpoints_of_an_abandoned_branch_are_deleted(tmp_path, recovered):
    copy = shutil.copytree(recovered, tmp_path / "copy")
    folder = copy / workdir.CHECKPOINTS
    there = checkpoint.steps(folder)
    recovery.write(copy, (_entry(there[-2]),))
    history = recovery.settle(copy, folder, recovery.read(copy))
    assert history[0].settled
    assert checkpoint.steps(folder) == there[:-1]
    assert recovery.read(copy) == history


# Pure functions


@pytest.mark.parametrize(
    ("before", "step", "expected"),
    [
        ([], 43, 40),
        ([], 42, 30),
        ([], 12, 0),
        ([(45, 40)], 47, 30),
        ([(45, 40), (47, 30)], 49, 20),
        ([(25, 10)], 46, 40),
        ([(45, 10)], 46, 10),
    ],
    ids=["the newest", "not a fresh one", "the start", "one further back", "further and further",
         "the newest again once the run came past the alarm", "the oldest again where there is none further back"],
)  # fmt: skip
def test_a_run_goes_back_to(before, step, expected):
    history = tuple(_entry(back_to, step=diverged) for diverged, back_to in before)
    assert recovery.target(history, step, [10, 20, 30, 40]) == expected


@pytest.mark.parametrize(("keep", "last"), [(2, (9, 6)), (3, (13, 6)), (2, None)])
def test_the_checkpoint_to_go_back_to_is_always_kept(keep, last):
    history = () if last is None else (_entry(last[1], step=last[0]),)
    start = last[1] if last else 0
    saved = list(range(2, start + 1, 2))
    left = set(saved)
    for step in range(start + 1, 30):
        assert recovery.target(history, step, sorted(left)) == recovery.target(history, step, saved)
        if step % 2 == 0:
            saved.append(step)
            left = recovery.to_keep(sorted({*left, step}), keep, set(saved), history)
    assert len(left) == 3


def test_checkpoints_of_interruptions_take_no_regular_ones_place():
    assert recovery.to_keep([10, 20, 21, 22, 23], 2, {10, 20}) == {10, 20, 22, 23}
    assert recovery.to_keep([10, 20, 30], 2, {10, 20, 30}) == {20, 30}


def test_factors_hold_for_a_while_and_multiply(monkeypatch):
    monkeypatch.setattr(recovery, "DURATION", 10)
    history = (_entry(10, learning_rate_factor=0.5), _entry(15, learning_rate_factor=0.5, chain_steps_factor=1.5))
    assert [recovery.learning_rate_factor(history, step) for step in (9, 10, 15, 20, 25)] == [1, 0.5, 0.25, 0.5, 1]
    assert [recovery.chain_steps(10, history, step) for step in (14, 15, 24, 25)] == [10, 15, 15, 10]
    for factor, expected in ((2.0, 80), (9.0, 90), (100.0, 1000)):
        assert recovery.chain_steps(10, 1000 * (_entry(10, chain_steps_factor=factor),), 15) == expected


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"reason": 3}]', "[1]"])
def test_a_damaged_history_is_refused_in_a_line(tmp_path, text):
    (tmp_path / recovery.FILE).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        recovery.read(tmp_path)
