"""From JEM to SADA-JEM part by part, and the number of chain steps, on digits over several seeds.

    python experiments/ablation.py

Every variant is JEM's configs/digits.py with one part more than the one before it: the clip of gradient and image
(which makes the noise needless, as released), class Gaussians to start from, batch norm whose chains take the batch's
statistics, plain images for p(x) beside 128 augmented ones for p(y|x), and ASAM. Iterations, learning rate and all else
stay. Then JEM and the last variant with other numbers of chain steps.

The replay buffers of all runs are judged by one classifier that had no part in any: the penultimate features and the
predictions of a plain WRN-10-1 of another seed, trained first.

A run that diverges goes back by itself (config.recovery); how often is in the results, and one that ends without a
model is stored as such. Results go to experiments/results/ablation.json run by run, and the command goes on where it
was cut off; `python experiments/results_page.py` makes the table and the figure.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from runs import RESULTS, ROOT, machine, run_command

import jem_jax
from jem_jax import datasets, loading, workdir
from jem_jax.datasets.splits import to_float
from jem_jax.evaluation import classification, sample_quality

CLIP = ["sampler.grad_clip=1", "sampler.clip_x=true", "sampler.noise_std=0"]
INFORMATIVE = [*CLIP, "sampler.init=class_gaussians"]
BATCH_NORM = [*INFORMATIVE, "model.norm=batch", "sampler.batch_statistics=true"]
# The larger batch counts an epoch's iterations: twice the epochs are as many iterations as before.
BRANCHES = [
    *BATCH_NORM, "data.augment_p_x=false", "data.input_noise=0", "training.labelled_batch_size=128",
    "training.epochs=80", "optimizer.decay_epochs=(48, 68)",
]  # fmt: skip
ASAM = [*BRANCHES, "optimizer.sam_rho=0.5", "optimizer.sam_adaptive=true"]
PARTS = {
    "JEM": [],
    "+ clip": CLIP,
    "+ class Gaussians": INFORMATIVE,
    "+ batch norm": BATCH_NORM,
    "+ separate branches": BRANCHES,
    "+ ASAM": ASAM,
}
STEPS = 10
VARIANTS = {name: [*settings, f"sampler.num_steps={STEPS}"] for name, settings in PARTS.items()} | {
    f"{name}, K {steps}": [*settings, f"sampler.num_steps={steps}"]
    for name, settings in {"JEM": [], "all parts": ASAM}.items()
    for steps in (5, 20)
}
REPORT = [
    "training.baseline=false", "evaluation.sections=classification,calibration,ood,adversarial",
    "evaluation.attack_linf=(0.1,)", "evaluation.attack_l2=(0.5,)", "evaluation.refined_linf=()",
]  # fmt: skip
JUDGE = ["objective.p_x=0", "training.baseline=false", "seed=1000", "evaluation.sections=classification"]
FILE = RESULTS / "ablation.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs seeds 0, 1, … of each variant (default 3)")
    parser.add_argument("--only", default="", help="variants whose name starts so")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    flags = parser.parse_args()
    judge = Judge(ROOT / "runs" / "ablation_judge")
    for seed in range(flags.seeds):
        for name, settings in VARIANTS.items():
            if not name.startswith(flags.only) or f"{name}/{seed}" in read()["runs"]:
                continue
            found = _one([*settings, *REPORT, *flags.set, f"seed={seed}"], judge)
            # Read again: another process may have stored a run meanwhile.
            store = read()
            store["runs"][f"{name}/{seed}"] = found
            FILE.write_text(json.dumps(store, indent=1) + "\n")
            print(f"{name}, seed {seed}: {found}", flush=True)


def read() -> dict[str, Any]:
    """What is stored so far."""
    if FILE.exists():
        return json.loads(FILE.read_text())
    return {"command": "python experiments/ablation.py", **machine(), "runs": {}}


class Judge:
    """A plain classifier, by whose features and predictions samples are measured.

    Args:
      path: its workdir; trained here where there is none yet.
    """

    def __init__(self, path: Path) -> None:
        run_command("digits", path, JUDGE)
        facts = workdir.read_facts(path)
        model = loading.read_model(path, facts)
        self._logits, self._features = (
            functools.partial(jax.jit(function), model.variables)
            for function in (model.network.logits, model.network.features)
        )
        train = to_float(datasets.load(facts.config.data).train.images)
        self._reference = np.asarray(self._features(train))

    def of(self, buffer: np.ndarray) -> dict[str, float]:
        """What a whole replay buffer looks like, clipped to [-1, 1]."""
        images = np.clip(buffer.reshape(-1, *buffer.shape[2:]), -1, 1)
        log_posterior = classification.log_posterior(np.asarray(self._logits(images)))
        return sample_quality.measures(log_posterior, np.asarray(self._features(images)), self._reference)


def _one(settings: list[str], judge: Judge) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = run_command("digits", Path(folder) / "run", settings)
        except SystemExit as error:
            return {"settings": settings, "failed": str(error).rpartition(" ended ")[2]}
        buffer = jem_jax.load(Path(folder) / "run").buffer
        assert buffer is not None
        quality = judge.of(np.asarray(buffer))
    jem = report["jem"]
    return {
        "settings": settings,
        "accuracy": jem["accuracy"],
        "ece": jem["ece"],
        "auroc": {
            kind: {score: values[score]["auroc"] for score in ("approximate_mass", "log_density", "max_posterior")}
            for kind, values in jem["ood"].items()
        },
        "pgd_linf_0.1": jem["pgd"]["linf"]["0.1"],
        "pgd_l2_0.5": jem["pgd"]["l2"]["0.5"],
        "buffer": quality,
        "training_seconds": report["run"]["seconds"]["training"],
        "recoveries": len(jem.get("recoveries", [])),
    }


if __name__ == "__main__":
    main()
