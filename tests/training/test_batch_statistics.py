"""Sampling after training by the statistics of each batch of chains, where training sampled so."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from jem_jax import datasets
from jem_jax.augment import to_float
from jem_jax.commands import config_files
from jem_jax.config import Data
from jem_jax.evaluation import sample_quality
from jem_jax.main import main
from jem_jax.report import inputs
from jem_jax.runs import workdir
from jem_jax.training import loop, network, trained
from jem_jax.training.network import Network

SETTINGS = {
    "training.epochs": 6,
    "training.baseline": False,
    "model.factory": "tiny:batch_norm_mlp",
    "optimizer.learning_rate": 0.01,
    "sampler.num_steps": 5,
    "sampler.buffer_size": 1000,
    "evaluation.ood_images": 70,
    "evaluation.attack_steps": 1,
    "evaluation.attack_linf": (),
    "evaluation.attack_l2": (),
    "evaluation.refined_images": 4,
    "evaluation.refined_linf": (0.1,),
    "evaluation.num_samples": 20,
}
COMMAND = ("--config=digits_jempp", *(f"--config.{name}={value}" for name, value in SETTINGS.items()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a small JEM with batch norm, trained on the digits in seconds."""
    path, dataset = tmp_path_factory.mktemp("batch_statistics"), datasets.load(Data())
    config = config_files.read("digits_jempp", [(name, str(value)) for name, value in SETTINGS.items()])
    workdir.write_facts(path, workdir.facts_of(config, dataset, 4))
    loop.train(config, dataset, path, "tiny", tiny.Stop())
    return path


def test_fresh_chains_stay_with_the_data(run):
    facts, dataset = workdir.read_facts(run), datasets.load(Data())
    model = trained.read_model(run, facts)
    assert model.buffer is not None

    def distance(images: np.ndarray) -> float:
        features = [model.network.features(model.variables, np.clip(some, -1, 1)) for some in (images, train)]
        return sample_quality.frechet_distance(*map(np.asarray, features))

    def fresh(batch_statistics: bool) -> float:
        config = facts.config
        sampler = dataclasses.replace(config.sampler, batch_statistics=batch_statistics)
        evaluation = dataclasses.replace(config.evaluation, num_samples=300, sample_steps=30)
        config = dataclasses.replace(config, sampler=sampler, evaluation=evaluation)
        drawn = inputs.fresh_chains(inputs.Sampler(config, model), dataclasses.replace(facts, config=config), dataset)
        return distance(drawn["unconditional"][:, -1])

    train = to_float(dataset.train.images)
    buffer = distance(model.buffer.reshape(-1, *facts.image_shape))
    assert fresh(batch_statistics=True) < 10 * buffer
    # By running statistics as many steps lead away.
    assert fresh(batch_statistics=False) > 10 * buffer


@pytest.mark.slow
def test_every_section_that_samples_uses_them_and_says_so(run, monkeypatch):
    sizes, batch_logits = set(), Network.batch_logits

    def watched(network, variables, x, key):
        sizes.add(len(x))
        return batch_logits(network, variables, x, key)

    monkeypatch.setattr(Network, "batch_logits", watched)
    for section in ("ood", "adversarial", "samples", "inpainting"):
        sizes.clear()
        assert main([*COMMAND, f"--config.evaluation.sections={section}", f"--workdir={run}", "--mode=evaluate"]) == 0
        # Of four images in the attack, five copies each; else training's batch.
        assert sizes == ({20} if section == "adversarial" else {64}), section
        how = json.loads((run / "report" / "report.json").read_text())["sections"][section]["how"]
        said = how.get("refinement_chains" if section == "adversarial" else "refinement", how)
        assert (said["statistics"], said["batch"]) == ("of each batch of chains", 64), section
        assert "in batches of 64" in (run / "report" / "report.html").read_text(), section
    sizes.clear()
    assert main([*COMMAND, f"--workdir={run}", "--mode=sample"]) == 0
    assert sizes == {64}


def test_steps_of_a_fresh_chain():
    by_batch = {"sampler.batch_statistics": True, "model.norm": "batch"}
    for settings, steps in (({}, 1000), (by_batch, 18), ({"evaluation.sample_steps": 7}, 7)):
        assert inputs.sample_steps(tiny.config(**settings)) == steps
    assert inputs.chain_batch(tiny.config(**by_batch)) > 0
    assert inputs.chain_batch(tiny.config(**by_batch, **{"schedule.freeze_norm": 0.5})) == 0


def test_chains_after_training_drop_no_units(run, monkeypatch):
    built, build = [], network.build
    monkeypatch.setattr(network, "build", lambda model, classes: built.append(model.dropout) or build(model, classes))
    facts = workdir.read_facts(run)
    model = dataclasses.replace(facts.config.model, dropout=0.5)
    trained.read_model(run, dataclasses.replace(facts, config=dataclasses.replace(facts.config, model=model)))
    assert built[-1] == 0
