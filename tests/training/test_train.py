"""The whole loop on tiny data: interrupted and resumed, diverged, finished, read back."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from command import metrics as metrics_of

import jem_jax
from jem_jax.augment import to_float
from jem_jax.common.errors import UserError
from jem_jax.datasets import Split
from jem_jax.distributed import devices
from jem_jax.distributed.interrupts import Interrupted
from jem_jax.evaluation import classification
from jem_jax.runs import checkpoint, metrics, workdir
from jem_jax.runs.metrics import TIME_FIELDS
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import loop, preflight, quantities, recovery, trained

EPOCHS, STEPS = 3, 5
LAST = EPOCHS * STEPS
SETTINGS = {**tiny.FULL, "training.epochs": EPOCHS, "recovery.patience": 5}
"""Log lines at 4, 8, 12, 15; validations and checkpoints at 5, 10, 15."""


@pytest.fixture(scope="module", autouse=True)
def proof(shared_steps):
    """Checkpoints of these short runs count as good after five iterations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "MIN_AGE", 5)
        yield


def _train(directory, stop=None, **overrides):
    return tiny.train(directory, stop, **{**SETTINGS, **overrides})


def _lines(directory):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _checkpoint(directory, name=workdir.CHECKPOINTS, step=None):
    return tiny.restored(directory, name, step, **SETTINGS)


def _assert_same_checkpoints(one, other):
    """The same bits and notes, but for times, in the last and the best checkpoints."""
    for name in (workdir.CHECKPOINTS, workdir.BEST):
        ours, theirs = (_checkpoint(directory, name) for directory in (one, other))
        assert ours.step == theirs.step
        assert not tiny.differing(ours.tree, theirs.tree)
        assert ours.note.keys() == theirs.note.keys()
        assert all(ours.note[key] == theirs.note[key] for key in ours.note if key not in TIME_FIELDS)


def _assert_same_run(one, other):
    """The same checkpoints, and the same metrics but for times."""
    _assert_same_checkpoints(one, other)
    assert metrics_of(one) == metrics_of(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    assert _train(directory).steps == LAST
    return directory


# To its end


@pytest.mark.parametrize(
    ("batches", "collection", "images"),
    [((32, 0), "batch_stats", 0), ((28, 0), "batch_stats", 7), ((32, 16), "batch_stats", 4), ((4, 0), "other", 0)],
)
def test_batch_norm_of_few_images_on_a_device_is_warned_of(batches, collection, images):
    sizes = {"training.batch_size": batches[0], "training.labelled_batch_size": batches[1]}
    config = tiny.config(**sizes, **{"sampler.buffer_size": 96})
    said = preflight.few_images(config, {collection: {}})
    assert (said is None) == (images == 0)
    assert said is None or f"sees {images} images on each of 4 devices" in said
    assert said is None or "Use batches of at least 32, or fewer devices" in said


def test_a_run_writes_a_line_every_so_many_iterations_and_at_every_validation(whole):
    lines = _lines(whole)
    progress = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation_accuracy" in line]
    assert [line["step"] for line in progress] == [4, 8, 12, 15]
    assert [line["step"] for line in validations] == [5, 10, 15]
    assert len(lines) == len(progress) + len(validations)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in progress:
        assert line["epoch"] == line["step"] / STEPS
        assert {"accuracy", "cross_entropy", "log_px_data", "log_px_samples", *TIME_FIELDS} <= line.keys()
        # The mean of three or four iterations is near that of any other.
        assert line["data_rms"] == pytest.approx(progress[0]["data_rms"], rel=0.1)
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_a_flax_module_named_by_its_factory_learns_and_leaves_checkpoints_and_a_picture(whole):
    tree = _checkpoint(whole).tree
    assert tree["state"]["params"].keys() == {"hidden", "norm", "classes"}
    assert int(tree["state"]["step"]) == 15
    nll = [line["validation_nll"] for line in _lines(whole) if "validation_nll" in line]
    assert nll[-1] < nll[0]
    assert checkpoint.steps(whole / workdir.CHECKPOINTS) == [10, 15]
    assert checkpoint.newest_whole(whole / workdir.CHECKPOINTS) == (15, {})
    assert [path.name for path in (whole / workdir.SAMPLES).iterdir()] == ["buffer_0000015.png"]


def test_validations_and_pictures_come_when_due_and_the_first_of_the_best_is_kept(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.75])
    monkeypatch.setattr(classification, "accuracy", lambda *_: next(accuracies))
    _train(tmp_path, **{"training.epochs": 5, "training.validate_every": 2, "training.sample_every": 3})
    assert [line["step"] for line in _lines(tmp_path) if "validation_accuracy" in line] == [10, 20, 25]
    pictures = sorted(path.name for path in (tmp_path / workdir.SAMPLES).iterdir())
    assert pictures == ["buffer_0000015.png", "buffer_0000025.png"]
    kept = _checkpoint(tmp_path, workdir.BEST)
    assert (checkpoint.steps(tmp_path / workdir.BEST), kept.note) == ([20], {"validation_accuracy": 0.75})
    assert not tiny.differing(kept.tree["state"], _checkpoint(tmp_path, step=20).tree["state"])
    assert _checkpoint(tmp_path).note["best_accuracy"] == 0.75


def test_a_run_that_ends_in_its_warm_up_is_warned_of():
    long, whole = (tiny.config(**{"optimizer.warmup_steps": n, "optimizer.learning_rate": 0.1}) for n in (200, 50))
    assert "reaches 0.025 of 0.1" in preflight.long_warmup(long, 50)
    assert preflight.long_warmup(whole, 50) is None


# Interrupted


def test_a_run_cut_off_again_and_again_is_the_undisturbed_one_bit_for_bit(whole, tmp_path, capsys):
    """Killed, and stopped within a log interval and an epoch, at the end of an epoch, and at that of the run."""
    settings, began = {"training.checkpoint_every": 3}, []
    # Killed first with two validations behind it, whose best is kept, and no checkpoint to go on from.
    for step, kill in ((11, True), (3, False), (5, False), (8, True), (LAST, False)):
        best = checkpoint.steps(tmp_path / workdir.BEST)
        stop = tiny.Stop(step, kill=kill)
        with pytest.raises(tiny.Killed if kill else Interrupted) as caught:
            _train(tmp_path, stop, **settings)
        began.append(stop.asked[0] - 1)
        assert stop.asked[-1] == step
        if kill:
            with (tmp_path / metrics.FILE).open("a") as file:
                file.write('{"step": 8, "lo')
            continue
        assert (caught.value.step, caught.value.total_steps) == (step, LAST)
        assert checkpoint.newest_whole(tmp_path / workdir.CHECKPOINTS) == (step, {})
        if step == 3:
            assert not checkpoint.steps(tmp_path / workdir.BEST)
            assert [path.name for path in (tmp_path / workdir.SET_ASIDE).iterdir()] == [f"best-{best[0]}"]
    assert began == [0, 0, 3, 5, 5]
    _assert_same_run(tmp_path, whole)
    finished = tiny.Stop()
    assert (_train(tmp_path, finished).steps, finished.asked) == (LAST, [])
    said = capsys.readouterr().out
    assert "tiny: warning: batch norm sees 2 images on each of 4 devices" in said
    assert "tiny: going on from iteration 3 of 15" in said


def test_what_is_damaged_is_left_out_and_the_rest_used(whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy")
    damaged, file = copy / workdir.CHECKPOINTS / str(LAST), copy / metrics.FILE
    (damaged / "note" / "metadata").write_text("{}")
    first, *others = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"\xff\xfe" + first + b"".join([*others, b'{"step": ', b"[" * 100_000, b"\n3\n", b'{"step": 1']))
    _train(copy)
    said = capsys.readouterr().out
    assert f"checkpoint {damaged} is not used: note/metadata is not what was written" in said
    assert (copy / workdir.SET_ASIDE / f"checkpoints-{LAST}" / "note" / "metadata").read_text() == "{}"
    _assert_same_checkpoints(copy, whole)
    lines = [metrics.read(directory / metrics.FILE) for directory in (copy, whole)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]][1:]


# Diverged


def test_an_undone_iteration_is_never_saved_and_a_mended_run_goes_on_and_may_grow(whole, tmp_path):
    _train(tmp_path, **{"training.epochs": 1})
    nowhere = Split(tiny.dataset().train.images, np.full(tiny.TRAIN, tiny.CLASSES, np.int32))
    no_loss = dataclasses.replace(tiny.dataset(), train=nowhere)
    config = tiny.config(**SETTINGS, **{"recovery.max_recoveries": 0})
    # Noticed by an interruption, by a line of the log, and by a checkpoint that is due before that.
    for kept, stop in ((5, 7), (5, -1), (9, -1)):
        if kept == 9:
            with pytest.raises(Interrupted):
                _train(tmp_path, tiny.Stop(9))
        before = _checkpoint(tmp_path)
        expected = rf"^training diverged at iteration {kept + 1}: .*; the checkpoint of iteration {kept} is kept\."
        with pytest.raises(UserError, match=expected) as caught:
            loop.train(config, no_loss, tmp_path, "tiny", tiny.Stop(stop))
        assert "\n" not in str(caught.value)
        assert checkpoint.newest_whole(tmp_path / workdir.CHECKPOINTS) == (kept, {})
        assert not tiny.differing(_checkpoint(tmp_path).tree, before.tree)
        # What is not finite is JSON too.
        logged = [line["step"] for line in _lines(tmp_path) if "epoch" in line]
        assert logged[-1] == (8 if stop < 0 else 5)
    assert _train(tmp_path).steps == LAST
    _assert_same_checkpoints(tmp_path, whole)


# Read back


@pytest.fixture(scope="module")
def run_with_baseline(whole, tmp_path_factory):
    directory = shutil.copytree(whole, tmp_path_factory.mktemp("run") / "run")
    config, dataset = tiny.config(**SETTINGS), tiny.dataset()
    workdir.write_facts(directory, RunFacts(config, dataset.image_shape, dataset.class_names, devices.cpu_devices()))
    loop.train(quantities.classifier_config(config), dataset, directory / workdir.BASELINE, "classifier", tiny.Stop())
    return directory


@pytest.mark.parametrize(("baseline", "best"), [(False, False), (False, True), (True, False)])
def test_load_gives_what_was_validated(run_with_baseline, baseline, best):
    loaded = jem_jax.load(str(run_with_baseline), baseline=baseline, best=best)
    trained_in = run_with_baseline / workdir.BASELINE if baseline else run_with_baseline
    step = checkpoint.steps(trained_in / (workdir.BEST if best else workdir.CHECKPOINTS))[-1]
    [expected] = [line for line in _lines(trained_in) if line["step"] == step and "validation_accuracy" in line]
    split = tiny.dataset().validation
    logits = np.asarray(jax.jit(loaded.logits)(to_float(split.images)))
    assert classification.accuracy(logits, split.labels) == expected["validation_accuracy"]
    nll = classification.negative_log_likelihood(logits, split.labels)
    assert nll == pytest.approx(expected["validation_nll"], rel=1e-5)
    assert (loaded.buffer is None) == (baseline or best)


def test_a_loaded_model_has_the_buffer_the_settings_averaged_parameters_and_their_statistics(run_with_baseline):
    _, buffer, config = jem_jax.load(run_with_baseline)
    assert config == tiny.config(**SETTINGS)
    assert buffer.shape == (32, 1, 8, 8, 1)
    assert not tiny.differing(buffer, _checkpoint(run_with_baseline).tree["buffer"])
    model = trained.read_model(run_with_baseline, workdir.read_facts(run_with_baseline))
    state = _checkpoint(run_with_baseline).tree["state"]
    for kind, own, other in (
        ("params", state["ema"], state["params"]),
        ("batch_stats", state["evaluation_stats"], state["model_state"]["batch_stats"]),
    ):
        assert not tiny.differing(model.variables[kind], own)
        assert tiny.differing(model.variables[kind], other)


def test_loaded_logits_are_those_of_each_image_alone(run_with_baseline):
    logits = jem_jax.load(run_with_baseline).logits
    x = to_float(tiny.dataset().test.images[:2])
    one = jax.jit(jax.vmap(lambda image: logits(image[None])[0]))(x)
    np.testing.assert_allclose(one, jax.jit(logits)(x), rtol=1e-4, atol=1e-5)


def test_the_baseline_is_a_plain_classifier_of_the_same_settings():
    joint = {"objective.p_xy": 0.5, "objective.energy_l2": 0.1}
    plain = quantities.classifier_config(tiny.config(**SETTINGS, **joint))
    assert plain == tiny.config(**SETTINGS, **{"objective.p_x": 0.0})
    assert quantities.buffer_size(plain, 3) == (0, 1)


def test_more_iterations_than_can_be_counted_are_refused():
    images, labels = np.broadcast_to(np.uint8(0), (24_000, 8, 8, 1)), np.arange(24_000, dtype=np.int32) % 3
    many = dataclasses.replace(tiny.dataset(), train=Split(images, labels))
    with pytest.raises(UserError, match=r"epochs 1000000 would be 3,000,000,000 .* it must be at most 715827$"):
        preflight.check_sizes(tiny.config(**{"training.epochs": 10**6}), many)
    preflight.check_sizes(tiny.config(**{"training.epochs": 715827}), many)
