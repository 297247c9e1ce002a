"""From JEM to SADA-JEM part by part, and the number of chain steps, on two data sets over several seeds.

    python -m experiments.paper.ablation digits
    python -m experiments.paper.ablation fashion_mnist [--data=FILE.npz]

Every variant adds one part to the one before: clips of score and image without noise; class Gaussians; batch norm with
the chains' own statistics; plain images for p(x) beside 128 augmented ones for p(y|x); ASAM. Iterations, learning rate
and all else stay. Then all parts train with batch norm that is frozen in the second half, and JEM and all parts with
other numbers of chain steps. Fashion-MNIST is half of the training images at 16×16, for about 420 iterations with the
paper's step size. The whole takes an hour.

One plain WRN-10-1 of another seed, trained first, gives the features and predictions for all replay buffers.

A run that diverges recovers by itself; the results count how often. A run that ends without a model is stored as such.
Writes experiments/results/ablation_NAME.json after every run, and resumes from there.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jem_jax
from experiments.runs import RESULTS, ROOT, machine, run_command
from jem_jax import datasets
from jem_jax.augment import to_float
from jem_jax.common import files
from jem_jax.config import Data
from jem_jax.evaluation import classification, sample_quality
from jem_jax.runs import workdir
from jem_jax.training import trained

CLIP = ["sampler.grad_clip=1", "sampler.clip_x=true", "sampler.noise_std=0"]
GAUSSIANS = ["sampler.init=class_gaussians"]
BATCH_NORM = ["model.norm=batch", "sampler.batch_statistics=true"]
BRANCHES = ["data.augment_p_x=false", "data.input_noise=0", "training.labelled_batch_size=128"]
ASAM = ["optimizer.sam_rho=0.5", "optimizer.sam_adaptive=true"]
FROZEN = ["schedule.freeze_norm=0.5"]
STEPS = 10


@dataclass(frozen=True)
class Bench:
    """What the variants are compared on."""

    config: str
    """name of a file in configs/"""
    base: Sequence[str]
    """settings that make it JEM"""
    longer: Sequence[str]
    """settings with batches of 128, which count an epoch's iterations: twice the epochs are as many as before"""
    images: int = 0
    """only so many of the training images, one in ten of them for validation; 0: all"""
    attack: str = "0.1"
    """ε of the L-inf attack"""


BENCHES = {
    "digits": Bench("digits_paper", [], ["training.epochs=80", "optimizer.decay_epochs=(48, 68)"]),
    "fashion_mnist": Bench(
        "fashion_mnist",
        [
            "data.image_size=16", "sampler.step_size=1", "sampler.grad_clip=0", "sampler.clip_x=false",
            "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=100", "training.epochs=1",
            "optimizer.decay_epochs=(0.7, 0.9)",
        ],
        ["training.epochs=2", "optimizer.decay_epochs=(1.4, 1.8)"],
        images=30_000,
        attack="0.03",
    ),
}  # fmt: skip
REPORT = ["training.baseline=false", "evaluation.sections=classification,calibration,ood,adversarial"]
JUDGE = ["objective.p_x=0", "training.baseline=false", "seed=1000", "evaluation.sections=classification"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--seeds", type=int, default=3, help="runs seeds 0, 1, … of each variant (default 3)")
    parser.add_argument("--only", nargs="*", default=[], metavar="VARIANT", help="only these, by their names")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--data", type=Path, help="an .npz as docs/pages/run.md describes; default: the set itself")
    flags = parser.parse_args()
    bench = BENCHES[flags.bench]
    common = [*bench.base, *flags.set, *_data(bench, flags.data)]
    feature_model = FeatureModel(ROOT / "runs" / f"ablation_judge_{flags.bench}", bench.config, common)
    for seed in range(flags.seeds):
        for name, settings in variants(bench).items():
            if name not in (flags.only or [name]) or f"{name}/{seed}" in read(flags.bench)["runs"]:
                continue
            found = _one(bench, common, [*settings, f"seed={seed}"], feature_model)
            # Read again: another process may have stored a run meanwhile.
            stored = read(flags.bench)
            stored["runs"][f"{name}/{seed}"] = found
            file(flags.bench).write_text(json.dumps(stored, indent=1) + "\n")
            print(f"{name}, seed {seed}: {found}", flush=True)


def variants(bench: Bench) -> dict[str, list[str]]:
    """{name: settings}: part by part, then other numbers of chain steps."""
    parts: dict[str, list[str]] = {"JEM": []}
    for name, more in {
        "+ clip": CLIP,
        "+ class Gaussians": GAUSSIANS,
        "+ batch norm": BATCH_NORM,
        "+ separate branches": [*BRANCHES, *bench.longer],
        "+ ASAM": ASAM,
    }.items():
        parts[name] = [*list(parts.values())[-1], *more]
    steps = {
        f"{name}, K {steps}": [*settings, f"sampler.num_steps={steps}"]
        for name, settings in {"JEM": parts["JEM"], "all parts": parts["+ ASAM"]}.items()
        for steps in (5, 20)
    }
    parts["all parts, frozen norm"] = [*parts["+ ASAM"], *FROZEN]
    return {name: [*settings, f"sampler.num_steps={STEPS}"] for name, settings in parts.items()} | steps


def file(name: str) -> Path:
    """Where the results of a bench are."""
    return RESULTS / f"ablation_{name}.json"


def read(name: str) -> dict[str, Any]:
    """What is stored so far."""
    if file(name).exists():
        return json.loads(file(name).read_text())
    return {"command": f"python -m experiments.paper.ablation {name}", **machine(), "runs": {}}


def _data(bench: Bench, given: Path | None) -> list[str]:
    """The setting that names the images; only some of them are copied first, to where a later call finds them."""
    if not bench.images:
        return [f"data.name={given.resolve()}"] if given else []
    path = ROOT / "runs" / f"{given.stem if given else bench.config}_{bench.images}.npz"
    if not path.exists():
        dataset = datasets.load(Data(name=str(given.resolve()) if given else bench.config))
        with files.whole(path) as partial, partial.open("wb") as stream:
            np.savez(
                stream,
                images=dataset.train.images[: bench.images],
                labels=dataset.train.labels[: bench.images],
                test_images=dataset.test.images,
                test_labels=dataset.test.labels,
                class_names=np.array(dataset.class_names),
            )
    return [f"data.name={path}"]


class FeatureModel:
    """A plain classifier, by whose features and predictions samples are measured.

    Args:
      path: its workdir; trained here where there is none yet.
      config: name of a file in configs/.
      settings: of all runs.
    """

    def __init__(self, path: Path, config: str, settings: Sequence[str]) -> None:
        run_command(config, path, [*settings, *JUDGE])
        facts = workdir.read_facts(path)
        model = trained.read_model(path, facts)
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


def _one(bench: Bench, common: Sequence[str], settings: list[str], feature_model: FeatureModel) -> dict[str, Any]:
    attacks = [f"evaluation.attack_linf=({bench.attack},)", "evaluation.attack_l2=(0.5,)", "evaluation.refined_linf=()"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = run_command(bench.config, Path(folder) / "run", [*common, *settings, *REPORT, *attacks])
        except SystemExit as error:
            return {"settings": settings, "failed": str(error).rpartition(" ended ")[2]}
        buffer = jem_jax.load(Path(folder) / "run").buffer
        assert buffer is not None
        quality = feature_model.of(np.asarray(buffer))
    jem = report["jem"]
    return {
        "settings": settings,
        "accuracy": jem["accuracy"],
        "ece": jem["ece"],
        "auroc": {
            kind: {score: values[score]["auroc"] for score in ("approximate_mass", "log_density", "max_posterior")}
            for kind, values in jem["ood"].items()
        },
        "pgd_linf": jem["pgd"]["linf"][bench.attack],
        "pgd_l2": jem["pgd"]["l2"]["0.5"],
        "buffer": quality,
        "training_seconds": report["run"]["seconds"]["training"],
        "recoveries": len(jem.get("recoveries", [])),
    }


if __name__ == "__main__":
    main()
