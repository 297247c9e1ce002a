"""How a model folder's density tells other images, and how much of its accuracy an attack leaves; on a CPU.

    python -m experiments.paper.model_scores experiments/models/cifar10 --data=cifar10.npz --outside=cifar100.npz

A report measures more, with chains for every image, for which a CPU takes hours.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import jem_jax
from experiments.runs import RESULTS
from jem_jax import datasets
from jem_jax.augment import to_float
from jem_jax.config import Data
from jem_jax.datasets import ood_sets
from jem_jax.distributed import devices
from jem_jax.evaluation import adversarial, ood

BATCH = 50
KINDS = ("log_density", "approximate_mass", "max_posterior")
"""of ood.SCORES, those that need no chain"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--data", required=True, help="its data, as config.data.name has it")
    parser.add_argument("--outside", nargs="*", default=[], help="other data sets")
    parser.add_argument("--images", type=int, default=2000, help="of each set, at most")
    parser.add_argument("--attacked", type=int, default=500, help="test images that are attacked")
    flags = parser.parse_args()
    started = time.monotonic()
    logits, _, config = jem_jax.load(flags.model)
    data = Data(name=flags.data)
    test = datasets.load(data).test
    key = jax.random.key(0)
    score = devices.over_examples(lambda _, x: ood.scores(key, logits, x, num_steps=0))
    chosen = test.rows(np.random.default_rng(config.seed).permutation(len(test))[: flags.images])
    sets = ood_sets.builtin(test, flags.images, config.seed)
    for name in flags.outside:
        sets[Path(name).stem] = ood_sets.named(data, name, test.images.shape[1:], flags.images, config.seed)

    inside = score(None, to_float(chosen.images), BATCH)
    found = {}
    for name, outside in sets.items():
        scores = score(None, outside.images, BATCH)
        found[name] = {kind: ood.detection(inside[kind], scores[kind])._asdict() for kind in KINDS}
    attacked = chosen.rows(np.arange(flags.attacked))
    robust = {norm: accuracy_under(logits, attacked, norm, epsilon) for norm, epsilon in (("l2", 0.5), ("linf", 0.03))}
    result = {
        "command": "python -m experiments.paper.model_scores "
        f"{flags.model} --data={Path(flags.data).name} --outside {' '.join(Path(name).name for name in flags.outside)} "
        f"--images={flags.images} --attacked={flags.attacked}",
        "machine": devices.describe(),
        "seconds": round(time.monotonic() - started),
        "jem": {"ood": found, "pgd": robust},
        "attack": {"images": flags.attacked, "steps": 20, "restarts": 1},
        "inside": len(chosen),
    }
    path = RESULTS / f"{flags.model.name}_model.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["jem"], indent=1), path, sep="\n")


def accuracy_under(logits, attacked, norm: str, epsilon: float) -> dict[str, float]:
    """The share of images that are right without an attack and with one of 20 steps."""

    def strongest(_, rows):
        key, classifier = jax.random.key(0), lambda _, x: logits(x)
        return adversarial.pgd(key, classifier, *rows, epsilon, norm=norm, num_steps=20, until_all_fall=True)[1]

    rows = to_float(attacked.images), attacked.labels
    clean = devices.over_examples(lambda _, rows: logits(rows[0]).argmax(axis=-1) == rows[1])(None, rows, BATCH)
    margins = devices.over_examples(strongest)(None, rows, BATCH)
    return {"0": float(clean.mean()), f"{epsilon:g}": float((margins < 0).mean())}


if __name__ == "__main__":
    main()
