"""A run becomes a model folder that loads, evaluates, samples and starts other runs, and is never written into."""

import hashlib
import io
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny
from command import TINY, contents, finished_run, restored

import jem_jax
from jem_jax.augment import to_float
from jem_jax.commands import export_model
from jem_jax.common.errors import UserError
from jem_jax.main import main
from jem_jax.runs import model_folder, workdir
from jem_jax.training import setup

BEGIN = (*TINY, "--workdir=run")
X = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model folder of a finished run; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    assert main(["--mode=export_model", f"--workdir={finished_run()}", f"--model_dir={folder}"]) == 0
    return folder


@pytest.fixture
def folder(exported, tmp_path, monkeypatch):
    """A copy in the working folder that a test may spoil."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(exported, tmp_path / "mine")


def said(capsys, *arguments):
    """The one line of a command that must be refused."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def describe(folder, change):
    described = json.loads((folder / model_folder.FILE).read_text())
    change(described)
    (folder / model_folder.FILE).write_text(json.dumps(described))


def replace(folder, name, content):
    """Puts other bytes in a file, and their hash in model.json, as a foreign writer would."""
    (folder / name).write_bytes(content)
    describe(folder, lambda described: described["sha256"].update({name: hashlib.sha256(content).hexdigest()}))


def test_it_is_the_run_but_for_float16_kernels_and_uint8_chains(exported):
    logits, buffer, config = jem_jax.load(exported)
    original, chains, original_config = jem_jax.load(finished_run())
    np.testing.assert_allclose(logits(X), original(X), atol=0.01)
    assert not np.array_equal(logits(X), original(X))
    assert config.model == original_config.model
    assert buffer.shape == chains.shape == (128, 1, 8, 8, 1)
    np.testing.assert_allclose(buffer, np.clip(chains, -1, 1), atol=1 / 255 + 1e-6)
    stored = np.load(exported / "weights.npz")
    assert {name: str(stored[name].dtype) for name in stored.files} == {
        "params/hidden/kernel": "float16", "params/hidden/bias": "float32",
        "params/classes/kernel": "float16", "params/classes/bias": "float32",
    }  # fmt: skip
    beyond_float16 = {"params": {"kernel": np.float32([[1e6, 1e-3]])}}
    assert not tiny.differing(model_folder.as_stored(beyond_float16), beyond_float16)


def test_the_card_states_data_results_and_distances(exported):
    card = (exported / "README.md").read_text()
    report = json.loads((finished_run() / "report" / "report.json").read_text())
    accuracy = f"| accuracy | {100 * report['jem']['accuracy']:.2f} % |"
    distances = ("| test images | 500 |", "| chains | 128 |", "holds 128.")
    for text in ("CC BY 4.0", "18 iterations", accuracy, *distances):
        assert text in card


@pytest.mark.parametrize("freeze_norm", [1.0, 0.5])
def test_logits_in_chains_use_their_batch_where_trainings_last_chains_did(tmp_path, freeze_norm):
    config = tiny.config(**{**tiny.FULL, "sampler.batch_statistics": True, "schedule.freeze_norm": freeze_norm})
    start = tiny.start(config)
    facts = workdir.RunFacts(config, (8, 8, 1), ("a", "b", "c"), 0)
    variables = jax.device_get(start.state).evaluation_variables
    model_folder.write(tmp_path / "m", facts, 0, variables, start.chains[:4], {}, "card")
    logits, buffer, _ = jem_jax.load(tmp_path / "m")
    x = buffer[:, 0]
    stored = jax.tree.map(np.asarray, model_folder.as_stored(variables))
    expected = start.network.batch_logits(stored, x, jax.random.key(0))
    in_chains = jax.jit(logits.in_chains)(x)
    np.testing.assert_allclose(in_chains, expected if freeze_norm == 1 else logits(x), atol=1e-5)
    assert np.abs(np.asarray(logits(x)) - np.asarray(expected)).max() > 0.1


def test_what_cannot_be_exported_is_refused(folder, tmp_path, capsys):
    unreported = shutil.copytree(finished_run(), tmp_path / "unreported")
    shutil.rmtree(unreported / "report")
    before = contents(tmp_path)
    for run, flags, words in (
        (unreported, ["--model_dir=m"], "no report of its last checkpoint, iteration 18"),
        (finished_run(), ["--model_dir=mine"], "is not empty"),
        (finished_run(), ["--model_dir=m", "--data_set=cifar"], "--data_set 'cifar' is no data set"),
    ):
        assert words in said(capsys, "--mode=export_model", f"--workdir={run}", *flags)
    assert contents(tmp_path) == before


def test_the_settings_hold_no_path():
    config = tiny.config(**{
        "data.name": "/home/me/cifar.npz", "data.data_dir": "/data", "evaluation.ood_sets": "mnist,/home/me/other.npz",
        "training.init_from": "/home/me/run", "evaluation.inception_weights": "/home/me/weights.pth",
    })  # fmt: skip
    assert "/home" not in repr(export_model._without_paths(config, None))
    assert export_model._without_paths(config, None).data.name == "cifar.npz"
    assert export_model._without_paths(config, "cifar10").data.name == "cifar10"
    assert export_model._without_paths(config, None).evaluation.ood_sets == "mnist"


@pytest.mark.parametrize(("classes", "mirrored"), [(1, False), (3, True)])
def test_chains_nearer_than_test_images_are_left_out(classes, mirrored):
    dataset = tiny.dataset()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (10, classes, 8, 8, 1)).astype(np.uint8)
    pixels[4, -1] = dataset.train.images[7][:, ::-1] if mirrored else dataset.train.images[7]
    nearest, chains = export_model._chosen(pixels, dataset, flip=mirrored)
    assert nearest.chains.reshape(10, classes)[4, -1] == 0
    assert chains.shape == (9, classes, 8, 8, 1)
    np.testing.assert_array_equal(chains[:, -1], to_float(np.delete(pixels[:, -1], 4, axis=0)))
    if classes > 1:
        np.testing.assert_array_equal(chains[:, 0], to_float(pixels[:9, 0]))
    # At most a thousand, evenly over the slots.
    spread = export_model._spread(np.arange(5000).reshape(2500, 2))
    assert (spread.size, spread[0, 0], spread[-1, 1]) == (1000, 0, 4999)


def report_in(folder):
    return json.loads((folder / "report" / "report.json").read_text())


def test_evaluating_and_sampling_write_beside_the_folder(folder, tmp_path):
    before = contents(folder)
    assert main(["--mode=evaluate", f"--workdir={folder}"]) == 0
    assert main(["--mode=sample", f"--workdir={folder}", "--report_dir=out"]) == 0
    found, report = report_in(tmp_path / "runs" / "mine"), report_in(finished_run())
    assert abs(found["jem"]["accuracy"] - report["jem"]["accuracy"]) < 0.01
    assert found["run"]["iterations"] == 18
    assert found["run"]["seconds"]["training"] == report["run"]["seconds"]["training"]
    assert (tmp_path / "out" / "samples" / "export" / "buffer.npz").is_file()
    # Other test images are measured anew.
    random = np.random.default_rng(0)
    np.savez("other.npz", images=random.integers(0, 17, (200, 8, 8)).astype(np.uint8), labels=np.arange(200) % 10)
    settings = ("--config.evaluation.sections=classification", "--config.data.name=other.npz")
    assert main(["--mode=evaluate", f"--workdir={folder}", *settings]) == 0
    assert report_in(tmp_path / "runs" / "mine")["jem"]["images"] == 20
    assert contents(folder) == before


def test_a_run_that_is_only_read_is_reported_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(finished_run())
    command = ["--mode=evaluate", f"--workdir={finished_run()}", "--config.evaluation.sections=classification"]
    assert main([*command, "--report_dir=out"]) == 0
    # The lock is a colleague's.
    access, lock = os.access, finished_run() / ".lock"
    monkeypatch.setattr(os, "access", lambda path, mode: path != lock and access(path, mode))
    assert main(command) == 0
    assert contents(finished_run()) == before
    for folder in ("out", "runs/run"):
        assert report_in(tmp_path / folder)["jem"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*TINY, "--workdir=mine"], "mine is a model folder, which is only read; train in another --workdir"),
        ([*TINY, "--workdir=mine", "--overwrite"], "mine is a model folder, which is only read"),
        ([*TINY, "--workdir=mine/run"], "mine is a model folder, which is only read"),
        (["--mode=evaluate", "--workdir=mine", "--report_dir=mine/out"], "mine/out lies in a model folder"),
        (["--mode=evaluate", "--workdir=mine", "--report_dir=other"], "folder other holds 'notes.txt'; name an empty"),
        ([*TINY, "--report_dir=out"], "--report_dir goes with --mode=evaluate and sample"),
        (["--mode=evaluate", "--workdir=mine", "--config.sampler.num_steps=9"], "sampler.num_steps is 2 there, 9 here"),
        (["--mode=evaluate", "--workdir=mine", "--config.data.name=wide.npz"],
         "mine is of other data: images of 'wide.npz' are [8, 12, 1]"),
        (["--mode=evaluate"], "required: --config"),
        (["--mode=export_model", "--workdir=other"], "--mode=export_model and --model_dir go together"),
        (["--mode=export_model", "--workdir=mine", "--model_dir=m"], "mine holds no run"),
        ([*BEGIN, "--config.training.init_from=gone"], "config.training.init_from: gone holds no run"),
        ([*BEGIN, "--config.training.init_from=run"], "config.training.init_from run is the workdir itself"),
        ([*BEGIN, "--config.training.init_from=mine", "--config.model.factory=tiny:batch_norm_mlp"],
         "config.training.init_from mine is of another network: it lacks batch_stats/norm/mean"),
    ],
)  # fmt: skip
def test_what_a_model_folder_is_not_for_or_does_not_fit(folder, tmp_path, capsys, arguments, named):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    np.savez("wide.npz", images=np.zeros((80, 8, 12), np.uint8), labels=np.arange(80) % 10)
    before = contents(tmp_path)
    assert named in said(capsys, *arguments)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert contents(folder).keys() == {name for name in before if name.startswith(f"{folder}/")}
    assert not (tmp_path / "run" / "run.json").exists()


def _npz(**arrays):
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


OBJECTS = _npz(**{"params/hidden/bias": np.array([{"a": 1}], dtype=object)})


def _narrow(folder):
    with np.load(folder / "weights.npz") as stored:
        arrays = dict(stored)
    return _npz(**{**arrays, "params/hidden/bias": arrays["params/hidden/bias"][:7]})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "weights.npz").write_bytes((f / "weights.npz").read_bytes()[:-1]), "weights.npz is not what"),
        (lambda f: (f / "buffer.npz").unlink(), "buffer.npz: No such file"),
        (lambda f: (f / "model.json").write_text("{"), "model.json cannot be read"),
        (lambda f: (f / "model.json").write_text("{}"), "model.json is not of a jem_jax model"),
        (lambda f: describe(f, lambda d: d.update(format=2)), "model.json is of format 2, and this version of jem_jax"),
        (lambda f: describe(f, lambda d: d.pop("sha256")), "model.json is damaged ('sha256')"),
        (lambda f: describe(f, lambda d: d["config"]["model"].update(heads=2)), "config.model.heads is not a setting"),
        (lambda f: describe(f, lambda d: d.update(image_shape=[8, 8])), "model.json is damaged"),
        (lambda f: replace(f, "weights.npz", OBJECTS), "weights.npz is no .npz of plain arrays (Object"),
        (lambda f: replace(f, "weights.npz", _narrow(f)), "bias as float32 (7,); this run's is float32 (16,)"),
        (lambda f: replace(f, "buffer.npz", _narrow(f)), "must hold 'chains', uint8"),
    ],
)  # fmt: skip
def test_a_spoiled_folder_is_refused_in_a_line(folder, capsys, spoil, named):
    spoil(folder)
    assert named in said(capsys, "--mode=sample", "--workdir=mine")
    with pytest.raises(UserError):
        jem_jax.load(folder)


def test_a_run_starts_from_parameters_statistics_and_a_buffer_of_its_size(tmp_path):
    config = tiny.config(**tiny.FULL, seed=5)
    facts = workdir.RunFacts(config, (8, 8, 1), ("a", "b", "c"), 0)
    variables = jax.device_get(tiny.start(config).state).evaluation_variables
    chains = np.full((32, 1, 8, 8, 1), 0.2, np.float32)
    model_folder.write(tmp_path / "source", facts, 7, variables, chains, {}, "card")
    variables = model_folder.as_stored(variables)
    settings = {**tiny.FULL, "training.init_from": str(tmp_path / "source")}
    state, buffer = setup.prepare(tiny.config(**settings), tiny.dataset()).begin()
    assert not tiny.differing({**state.model_state, "params": state.params}, variables)
    assert not tiny.differing(state.ema, variables["params"])
    assert int(state.step) == 0
    assert not any(np.any(moment) for moment in jax.tree.leaves(state.opt_state))
    np.testing.assert_allclose(buffer, chains, atol=1 / 255)
    _, buffer = setup.prepare(tiny.config(**settings, **{"sampler.buffer_size": 64}), tiny.dataset()).begin()
    assert len(buffer) == 64
    assert np.asarray(buffer).std() > 0.1


def test_training_from_a_workdir_begins_at_its_accuracy_and_goes_on_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run(), "source")
    command = [*TINY, "--workdir=run", "--config.training.init_from=source", "--config.optimizer.learning_rate=1e-30"]
    command.append("--config.training.baseline=true")
    assert main(command) == 0
    before, after = (restored(path).tree["state"]["params"] for path in (finished_run(), tmp_path / "run"))
    assert not tiny.differing(before, after)
    plain = jem_jax.load("run", baseline=True).logits
    assert not np.allclose(plain(X), jem_jax.load("source").logits(X), atol=1e-3)
    shutil.rmtree("source")
    assert main([*command, "--config.training.epochs=2"]) == 0
    assert restored(tmp_path / "run").step == 36
