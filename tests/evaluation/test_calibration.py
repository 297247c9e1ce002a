"""Classification and calibration against scikit-learn, closed forms and hand-made bins."""

import json
import types

import numpy as np
import pytest
import tiny
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics

from jem_jax.datasets import Split
from jem_jax.evaluation import calibration, classification
from jem_jax.report import classification as report_classification


@pytest.fixture
def random_logits():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 500)
    logits = random.normal(size=(500, 4)).astype(np.float32)
    logits[np.arange(500), labels] += 1.5
    return logits, labels


def _logits(confidences) -> np.ndarray:
    """Logits of two classes, the first of which has these probabilities."""
    first = np.asarray(confidences)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([first, 1 - first], axis=1))


def test_classification_is_scikit_learns(random_logits):
    logits, labels = random_logits
    posterior, predicted = np.exp(log_softmax(logits.astype(np.float64), axis=1)), logits.argmax(axis=1)
    np.testing.assert_allclose(classification.log_posterior(logits), np.log(posterior), rtol=1e-9, atol=1e-12)
    assert classification.accuracy(logits, labels) == sklearn_metrics.accuracy_score(labels, predicted)
    assert classification.negative_log_likelihood(logits, labels) == pytest.approx(
        sklearn_metrics.log_loss(labels, posterior), rel=1e-9
    )
    onehot = np.eye(4)[labels]
    assert classification.brier_score(logits, labels) == pytest.approx(((posterior - onehot) ** 2).sum(1).mean())
    confusion = classification.confusion_matrix(logits, labels)
    np.testing.assert_array_equal(confusion, sklearn_metrics.confusion_matrix(labels, predicted))
    recall, precision = classification.recall_and_precision(confusion)
    np.testing.assert_allclose(recall, sklearn_metrics.recall_score(labels, predicted, average=None))
    np.testing.assert_allclose(precision, sklearn_metrics.precision_score(labels, predicted, average=None))


def test_a_class_with_no_example_and_one_never_predicted_have_no_share():
    recall, precision = classification.recall_and_precision(np.array([[2, 0, 1], [0, 0, 0], [1, 0, 3]]))
    assert np.isnan(recall[1])
    assert np.isnan(precision[1])
    np.testing.assert_allclose([recall[0], precision[2]], [2 / 3, 3 / 4])


def test_logits_of_any_size_give_a_posterior():
    logits = np.array([[1e4, -1e4], [-1e30, -1e30]], np.float32)
    np.testing.assert_allclose(np.exp(classification.log_posterior(logits)), [[1, 0], [0.5, 0.5]])


def test_ece_of_bins_made_by_hand():
    # Two bins of ten: (0.6, 0.7] holds confidence 0.65 at accuracy 1/2, (0.8, 0.9] holds 0.85 at accuracy 1.
    logits = _logits([0.65, 0.65, 0.85, 0.85, 0.85])
    labels = np.array([0, 1, 0, 0, 0])
    assert calibration.expected_calibration_error(logits, labels, 10) == pytest.approx(2 / 5 * 0.15 + 3 / 5 * 0.15)
    assert calibration.expected_calibration_error(logits, labels, 1) == pytest.approx(abs(3.85 / 5 - 4 / 5))
    assert calibration.maximum_calibration_error(logits, labels, 10) == pytest.approx(0.15)
    diagram = calibration.reliability(logits, labels, 10)
    assert diagram.counts.tolist() == [0] * 6 + [2, 0, 3, 0]
    np.testing.assert_allclose(diagram.confidence[[6, 8]], [0.65, 0.85])
    np.testing.assert_allclose(diagram.accuracy[[6, 8]], [0.5, 1])
    assert np.isnan(diagram.accuracy[[0, 7, 9]]).all()
    np.testing.assert_allclose(diagram.edges, np.linspace(0, 1, 11))
    # A confidence on an edge belongs to the bin below it.
    on_edges = calibration.reliability(_logits([0.5, 0.75, 1.0]), np.zeros(3, int), 4)
    assert on_edges.counts.tolist() == [0, 1, 1, 1]


def test_bins_of_equal_mass_hold_equally_many(random_logits):
    logits, labels = random_logits
    diagram = calibration.reliability(logits, labels, 15, equal_mass=True)
    assert diagram.counts.min() >= 500 // 15
    assert diagram.counts.max() <= 500 // 15 + 1
    assert (np.diff(diagram.confidence) > 0).all()
    expected = (diagram.counts * np.abs(diagram.confidence - diagram.accuracy)).sum() / 500
    assert calibration.expected_calibration_error(logits, labels, 15, equal_mass=True) == pytest.approx(expected)


def test_the_interval_holds_the_ece_and_shrinks_with_the_examples(random_logits):
    logits, labels = random_logits
    low, high = calibration.ece_interval(logits, labels, seed=3)
    assert low < calibration.expected_calibration_error(logits, labels) < high
    assert (low, high) == calibration.ece_interval(logits, labels, seed=3)
    again = np.tile(np.arange(500), 8)
    narrow = calibration.ece_interval(logits[again], labels[again], seed=3)
    assert narrow[1] - narrow[0] < (high - low) / 2


@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_the_fitted_temperature_is_the_one_the_labels_were_drawn_with(temperature):
    random = np.random.default_rng(2)
    logits = random.normal(scale=2, size=(50_000, 5))
    posterior = np.exp(classification.log_posterior(logits / temperature))
    labels = (random.uniform(size=(len(logits), 1)) > posterior.cumsum(axis=1)).sum(axis=1).clip(max=4)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("sign", [1, -1], ids=["all right", "all wrong"])
def test_there_is_no_best_temperature_at_a_bound(random_logits, sign):
    logits, _ = random_logits
    assert calibration.fit_temperature(logits, (sign * logits).argmax(axis=1)) is None


def test_a_temperature_that_does_not_exist_has_no_column(tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8), np.arange(60) % 3
    split = Split(images, labels.astype(np.int32))
    right, noise = np.eye(3)[labels] * 5, random.normal(size=(60, 3))
    # All validation images are classified correctly by the JEM, and not by the classifier.
    logits = {"jem": right + 0.1 * noise, "baseline": right + 4 * noise}
    facts = types.SimpleNamespace(config=tiny.config())
    subject = types.SimpleNamespace(
        settings=facts.config.evaluation, facts=facts, folder=tmp_path, test_logits=logits,
        dataset=types.SimpleNamespace(validation=split, test=split), logits=lambda name, _: logits[name],
    )  # fmt: skip
    result = report_classification.calibrate(subject)
    jem, baseline = result.models["jem"], result.models["baseline"]
    assert jem.keys() - {"temperature_missing"} == baseline.keys()
    assert jem["temperature"] is None
    assert jem["nll_scaled"] is None
    assert "classified correctly" in jem["temperature_missing"]
    assert baseline["nll_scaled"] < baseline["nll"]
    (table,) = (block for block in result.blocks if block["kind"] == "table")
    assert [row[0].split(",")[0] for row in table["rows"]] == ["JEM", "classifier", "classifier"]
    assert json.loads(json.dumps(result.models)) == result.models
