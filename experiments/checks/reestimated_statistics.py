"""What re-estimated batch statistics change in a trained network, without training anything.

    python -m experiments.checks.reestimated_statistics WEIGHTS.npz --data=cifar10.npz --outside=house_numbers.npz

WEIGHTS.npz holds a WRN with batch norm: "params/…" and "batch_stats/…" by path, as running statistics left training.
The statistics are estimated anew from 2,000 plain training images. Both are compared on 2,000 test images, and by the
AUROC of log p~ and max p(y|x) against 500 outside images. Result: experiments/results/reestimated_statistics.json
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from experiments.runs import store
from jem_jax import datasets, energy
from jem_jax.augment import to_float
from jem_jax.config import Data
from jem_jax.distributed import devices, processes
from jem_jax.evaluation import calibration, classification, ood
from jem_jax.training import statistics
from jem_jax.training.network import Network
from jem_jax.wide_resnet import WideResNet

TEST, OUTSIDE, ESTIMATED, BATCH = 2000, 500, 2000, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--outside", required=True)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=8)
    flags = parser.parse_args()
    processes.start(processes.Cluster(), devices.choose_cpu_devices((BATCH,)), 1)
    dataset = datasets.load(Data(name=flags.data))
    outside = datasets.load(Data(name=flags.outside)).test.images[:OUTSIDE]
    network = Network(WideResNet(dataset.num_classes, flags.depth, flags.width, norm="batch"))
    arrays = np.load(flags.weights, allow_pickle=False)
    tree = unflatten_dict({tuple(key.split("/")): arrays[key].astype(np.float32) for key in arrays.files})
    running = {"params": tree["params"], "batch_stats": tree["batch_stats"]}
    estimate = statistics.estimator(network, dataset.train, ESTIMATED, seed=0)
    renewed = {**running, "batch_stats": jax.device_get(estimate(devices.replicate(running)))}
    logits_of = devices.over_examples(lambda variables, images: network.logits(variables, to_float(images)))
    test = dataset.test.images[:TEST], dataset.test.labels[:TEST]
    summary = {
        name: _measure(lambda images, variables=variables: logits_of(variables, images, BATCH), *test, outside)
        for name, variables in {"running": running, "re-estimated": renewed}.items()
    }
    store(
        "reestimated_statistics",
        f"python -m experiments.checks.reestimated_statistics {flags.weights.name}",
        summary,
        [],
    )


def _measure(logits_of: Any, images: np.ndarray, labels: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    inside, other = logits_of(images), logits_of(outside)
    scores = {
        "log_density": lambda logits: np.asarray(energy.log_density(logits)),
        "max_posterior": lambda logits: np.asarray(energy.log_posterior(logits).max(axis=-1)),
    }
    return {
        "accuracy": classification.accuracy(inside, labels),
        "nll": classification.negative_log_likelihood(inside, labels),
        "ece": calibration.expected_calibration_error(inside, labels, 15),
        **{f"auroc_{name}": ood.auroc(score(inside), score(other)) for name, score in scores.items()},
    }


if __name__ == "__main__":
    main()
