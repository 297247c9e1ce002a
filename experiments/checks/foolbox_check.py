"""PGD of this package beside foolbox's, on the same models, images and ε.

    pip install foolbox
    python -m experiments.checks.foolbox_check WORKDIR

WORKDIR is any finished run. Both attacks take the same number of steps of ε/4 from one random start, in L∞ and L2.
foolbox returns the last point and this package the strongest of all, so its robust accuracy may be a little lower.
Writes experiments/results/foolbox_check.json. The exit status is 1 if two accuracies differ by over two points.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import jax
import jax.numpy as jnp
import numpy as np

import jem_jax
from experiments.runs import store
from jem_jax import datasets
from jem_jax.augment import to_float
from jem_jax.datasets import Split
from jem_jax.evaluation import adversarial

STEPS = 20
STEP = 0.25  # of ε, as adversarial.pgd takes it
EPSILONS = {"linf": (0.025, 0.05, 0.1, 0.15), "l2": (0.25, 0.5, 1.0)}
ATTACKS = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}
TOLERANCE = 0.02

Logits = Callable[[jax.Array], jax.Array]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--images", type=int, default=500, help="the first so many test images (default 500)")
    flags = parser.parse_args()
    config = jem_jax.load(flags.workdir).config
    test = datasets.load(config.data).test
    test = test.rows(np.arange(min(flags.images, len(test))))
    found: dict[str, Any] = {}
    for name in ("jem", "baseline"):
        logits = jem_jax.load(flags.workdir, baseline=name == "baseline").logits
        found[name] = {norm: _compare(logits, test, norm) for norm in EPSILONS}
    apart = max(row["apart"] for norms in found.values() for rows in norms.values() for row in rows.values())
    how = {
        "foolbox": foolbox.__version__, "jax": jax.__version__, "data": config.data.name,
        "epochs": config.training.epochs, "images": len(test), "steps": STEPS, "step": "ε/4", "restarts": 1,
        "epsilon": "in [0, 1] pixels", "largest_difference": apart, "tolerance": TOLERANCE,
    }  # fmt: skip
    store("foolbox_check", "python -m experiments.checks.foolbox_check WORKDIR", how, found)
    return int(apart > TOLERANCE)


def _compare(logits: Logits, test: Split, norm: str) -> dict[str, dict[str, float]]:
    """ε -> robust accuracy by either implementation, and how far they are apart."""
    images, labels = to_float(test.images), jnp.asarray(test.labels)
    pgd = functools.partial(adversarial.pgd, classifier=lambda _, x: logits(x), norm=norm, num_steps=STEPS)
    run = jax.jit(lambda epsilon: pgd(jax.random.key(0), x=images, labels=labels, epsilon=epsilon)[1])
    rows = {}
    for epsilon in EPSILONS[norm]:
        ours = float((run(epsilon) < 0).mean())
        theirs = _foolbox(logits, test, norm, epsilon)
        rows[f"{epsilon:g}"] = {"jem_jax": ours, "foolbox": theirs, "apart": round(abs(ours - theirs), 6)}
    return rows


def _foolbox(logits: Logits, test: Split, norm: str, epsilon: float) -> float:
    # foolbox's images are in [0, 1], so that its ε has the unit that ours has.
    np.random.seed(0)
    model = foolbox.models.JAXModel(jax.jit(lambda x: logits(2 * x - 1)), bounds=(0, 1))
    attack = ATTACKS[norm](rel_stepsize=STEP, steps=STEPS, random_start=True)
    images, labels = jnp.asarray(test.images, jnp.float32) / 255, jnp.asarray(test.labels)
    _, _, fooled = attack(model, images, labels, epsilons=epsilon)
    return float(np.mean(~np.asarray(fooled)))


if __name__ == "__main__":
    sys.exit(main())
