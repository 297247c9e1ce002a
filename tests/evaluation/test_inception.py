"""FID and Inception score by torch-fidelity: what it is given, and what is said where it cannot be had."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jem_jax.datasets import Split
from jem_jax.evaluation import fid
from jem_jax.report import samples
from jem_jax.report.result import Result

SAMPLES = np.linspace(-1.5, 1.5, 4 * 4 * 4).reshape(4, 4, 4, 1)
REFERENCE = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    return file


@pytest.fixture
def library(monkeypatch):
    """torch-fidelity and what it needs of torch, as far as one can see what they are called with."""
    calls = []

    def calculate_metrics(**settings):
        calls.append(settings)
        return {"frechet_inception_distance": 12.5, "inception_score_mean": 7.5, "inception_score_std": 0.1}

    torch = types.SimpleNamespace(
        utils=types.SimpleNamespace(data=types.SimpleNamespace(Dataset=object)),
        from_numpy=lambda array: array,
        cuda=types.SimpleNamespace(is_available=lambda: False),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    return calls


def test_without_the_file_or_the_library_it_says_what_is_missing(weights, monkeypatch):
    with pytest.raises(fid.Unavailable, match=r"inception_weights nowhere\.pth is not a file"):
        fid.measure(SAMPLES, REFERENCE, Path("nowhere.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace())
    with pytest.raises(fid.Unavailable, match="torch_fidelity is missing: pip install torch-fidelity"):
        fid.measure(SAMPLES, REFERENCE, weights)


def test_images_are_given_as_coloured_bytes_and_the_report_says_of_which_or_why_not(library, weights):
    subject = types.SimpleNamespace(
        settings=types.SimpleNamespace(inception_weights=""),
        jem=types.SimpleNamespace(buffer=SAMPLES[:, None]),
        dataset=types.SimpleNamespace(train=Split(REFERENCE, np.zeros(5, np.int32))),
        facts=types.SimpleNamespace(image_shape=(4, 4, 1)),
    )
    result = Result(models={"jem": {}})
    samples._inception(subject, result)
    assert not library
    subject.settings.inception_weights = str(weights)
    samples._inception(subject, result)
    missing, said = (block["text"] for block in result.blocks)
    assert "were not measured" in missing
    assert "FID 12.50 and Inception score 7.50 of the whole buffer, 4 images, none chosen" in said
    assert result.models["jem"]["inception"] == {"fid": 12.5, "inception_score": 7.5, "images": 4, "reference": 5}
    (settings,) = library
    assert settings["feature_extractor_weights_path"] == str(weights)
    assert settings["fid"] is settings["isc"] is True
    ours, theirs = settings["input1"], settings["input2"]
    assert (len(ours), len(theirs)) == (4, 5)
    assert (ours[0].shape, ours[0].dtype) == ((3, 4, 4), np.uint8)
    assert (ours[0].min(), ours[3].max()) == (0, 255)
    assert np.array_equal(ours[1][0], ours[1][2])
    assert np.array_equal(theirs[2], REFERENCE[2].transpose(2, 0, 1))
