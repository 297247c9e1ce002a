"""The models that come with the code are whole, and one script shows what they do."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scripts
import tiny

import jem_jax
from jem_jax.runs import model_folder, workdir

MODELS = Path(__file__).parents[2] / "experiments" / "models"
FOLDERS = sorted(path for path in MODELS.iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_a_model_that_comes_with_the_code_loads(folder):
    logits, buffer, _ = jem_jax.load(folder)
    # The other model's logits are those of the README's example.
    if folder.name == "fashion_mnist":
        shipped = np.load(MODELS / "fashion_mnist_test.npz", allow_pickle=False)
        found = np.asarray(logits(shipped["images"].astype(np.float32) / 127.5 - 1))
        assert np.isfinite(found).all()
        assert found.shape[1] == len(model_folder.describe(folder).facts.class_names)
        assert (found.argmax(axis=-1) == shipped["labels"]).sum() >= 12
    assert buffer.shape[0] * buffer.shape[1] <= model_folder.MOST_CHAINS
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6


def test_a_guess_keeps_what_is_known_of_the_buffers_gaussian():
    shown = scripts.load("shipped_model")
    random = np.random.default_rng(0)
    # The lower half repeats the upper one.
    upper = random.normal(size=(400, 2, 3, 1)) * 20
    chains = np.concatenate([upper, upper], axis=1).astype(np.float32)
    known = shown._known(chains[:5])
    np.testing.assert_allclose(shown.guess(chains, chains[:5], known)[:, 2:], upper[:5], atol=0.5)


def test_the_script_draws_a_picture_of_any_model_folder(tmp_path, monkeypatch, capsys):
    config = tiny.config(**tiny.FULL)
    start = tiny.start(config)
    variables = jax.device_get(start.state).evaluation_variables
    facts = workdir.RunFacts(config, (8, 8, 1), ("a", "b", "c"), 0)
    model_folder.write(tmp_path / "mine", facts, 0, variables, start.chains, {}, "card")
    monkeypatch.setattr(sys, "argv", ["shipped_model.py", str(tmp_path / "mine"), f"--out={tmp_path}"])
    scripts.load("shipped_model").main()
    assert (tmp_path / "mine.png").is_file()
    assert "uniform noise" in capsys.readouterr().out
