"""The mode that makes a model folder of a run: its last checkpoint, rounded, with a model card.

python -m jem_jax.main --mode=export_model --workdir=runs/digits --model_dir=models/digits
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jem_jax import datasets, report
from jem_jax.augment import to_float, to_uint8
from jem_jax.common.errors import UserError, printable, shown
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.datasets.sources import SOURCES
from jem_jax.distributed import devices, processes
from jem_jax.evaluation import classification, sample_quality
from jem_jax.report import summary
from jem_jax.runs import model_folder, workdir
from jem_jax.runs.metrics import duration
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import network, trained

_COMPARED = 1000
"""test images whose distances and classes are compared"""
_PERCENTILES = (1, 10, 50)
_LONG = ("confusion", "recall", "precision", "class_shares")
"""what report.json says at length"""
_KRIZHEVSKY = "(Krizhevsky 2009), which states no licence"
_LICENCES = {
    "digits": "scikit-learn's digits, from UCI's (Alpaydin and Kaynak 1998), CC BY 4.0",
    "cifar10": f"CIFAR-10 {_KRIZHEVSKY}",
    "cifar100": f"CIFAR-100 {_KRIZHEVSKY}",
    "svhn_cropped": "SVHN (Netzer et al. 2011), for non-commercial use only",
    "mnist": "MNIST (LeCun, Cortes and Burges 1998), which states no licence",
    "fashion_mnist": "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT licence",
}


class Nearest(NamedTuple):
    """Distances of images from their nearest training images: L2 over pixels in [-1, 1]."""

    chains: np.ndarray
    """[N]"""
    test: np.ndarray
    """[M]"""

    @property
    def limit(self) -> float:
        """The 1st percentile of test images: what is nearer may be a copy."""
        return float(np.percentile(self.test, 1))


class Rounding(NamedTuple):
    """The effect of storing the weights in fewer bits."""

    images: int
    changed: int
    """of them have another class"""
    accuracy: float
    """as stored"""


def execute(config: Config, path: Path, model_dir: Path, data_set: str | None) -> int:
    """Makes a model folder of a run's last checkpoint, and returns the exit status.

    Args:
      config: the run's settings; `data.name` may be another copy of its images.
      path: the workdir.
      model_dir: the folder to make, missing or empty.
      data_set: the public name of the images, where the run had them from a file.

    Raises:
      UserError: there is no run, no report of its last checkpoint, or the folder cannot be made.
    """
    if data_set is not None and data_set not in _LICENCES and data_set not in SOURCES:
        raise UserError(f"--data_set {shown(data_set)} is no data set; there are {', '.join(_LICENCES)}")
    known = workdir.read_facts(path)
    dataset = datasets.load(config.data)
    workdir.check_reading(path, known, workdir.facts_of(config, dataset, 0), but=("data.name",))
    processes.start(processes.Cluster(), devices.choose_cpu_devices(()), 1)
    arrays = trained.read_arrays(path, known)
    values = _report(path, arrays.step)
    nearest, chains = None, None
    if arrays.buffer is not None:
        nearest, chains = _chosen(to_uint8(_spread(arrays.buffer)), dataset, config.data.flip)
    rounding = _rounding(config, arrays.variables, dataset)
    shared = dataclasses.replace(known, config=_without_paths(known.config, data_set))
    about = _about(values, nearest, chains, rounding)
    card = _card(model_dir.resolve().name, shared, arrays, values, about)
    for file in model_folder.write(model_dir, shared, arrays.step, arrays.variables, chains, about, card):
        print(printable(f"{file}  {file.stat().st_size:,} bytes"), flush=True)
    return 0


def _report(path: Path, step: int) -> dict[str, Any]:
    """report.json of the last checkpoint."""
    written = report.read(path)
    if written is None or written.values["run"]["iterations"] != step:
        raise UserError(
            f"{path} holds no report of its last checkpoint, iteration {step}, for the model card; make one with "
            f"--mode=evaluate --workdir={path}"
        )
    return written.values


def _spread(buffer: np.ndarray) -> np.ndarray:
    """At most 1,000 chains out of the whole buffer, evenly over its slots, as many of each class."""
    return buffer[_evenly(len(buffer), max(1, model_folder.MOST_CHAINS // buffer.shape[1]))]


def _evenly(total: int, most: int) -> np.ndarray:
    return np.linspace(0, total - 1, min(total, most)).astype(int)


def _chosen(pixels: np.ndarray, dataset: Dataset, flip: bool) -> tuple[Nearest, np.ndarray | None]:
    """The chains [n, classes, H, W, C] float that are no nearer to a training image than test images are.

    Those of a class stay its own; where the classes lose different numbers, all keep as many as the fewest.
    """
    chains, train = to_float(pixels), to_float(dataset.train.images)
    flat = chains.reshape(-1, *dataset.image_shape)
    test = to_float(dataset.test.images[_evenly(len(dataset.test), _COMPARED)])
    nearest = Nearest(_distances(flat, train, flip), _distances(test, train, flip))
    far = nearest.chains.reshape(chains.shape[:2]) >= nearest.limit
    slots = int(far.sum(axis=0).min())
    far_chains = [chains[far[:, label], label][:slots] for label in range(chains.shape[1])]
    return nearest, np.stack(far_chains, axis=1) if slots else None


def _distances(images: np.ndarray, train: np.ndarray, flip: bool) -> np.ndarray:
    """To the nearest training image, or to a mirrored one where training saw those too."""
    _, distances = sample_quality.nearest(images, train)
    return np.minimum(distances, sample_quality.nearest(images[:, :, ::-1], train)[1]) if flip else distances


def _rounding(config: Config, variables: Any, dataset: Dataset) -> Rounding:
    net = network.build(config.model, dataset.num_classes)
    test = dataset.test.rows(np.arange(len(dataset.test))[:_COMPARED])
    before, after = (
        network.describe(net, net.cast(weights), to_float(test.images), config.evaluation.batch_size)[0]
        for weights in (variables, model_folder.as_stored(variables))
    )
    changed = int((before.argmax(axis=-1) != after.argmax(axis=-1)).sum())
    return Rounding(len(test), changed, classification.accuracy(after, test.labels))


def _without_paths(config: Config, data_set: str | None) -> Config:
    """The settings as others can use them: names stay, and of paths the last part of the data's alone."""
    name = data_set or (config.data.name if _is_name(config.data.name) else Path(config.data.name).name)
    others = ",".join(filter(_is_name, config.evaluation.ood_set_names))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, name=name, data_dir="", manual_dir=""),
        training=dataclasses.replace(config.training, init_from="", cpu_devices=0),
        evaluation=dataclasses.replace(config.evaluation, ood_sets=others, inception_weights=""),
    )


def _is_name(data: str) -> bool:
    return data in _LICENCES or data in SOURCES or data.startswith("tfds:")


def _about(
    values: dict[str, Any], nearest: Nearest | None, chains: np.ndarray | None, rounding: Rounding
) -> dict[str, Any]:
    """The JSON beside the settings."""
    run = values["run"]
    results = _short(values["jem"])
    if "ood" in results:
        results["ood"] = {Path(name).name: scores for name, scores in results["ood"].items()}
    about: dict[str, Any] = {
        "results": results,
        "training": {name: run[name] for name in ("split_sizes", "seed", "seconds", "devices", "versions")},
        "rounding": rounding._asdict(),
    }
    if nearest is not None:
        count = 0 if chains is None else chains.shape[0] * chains.shape[1]
        about["nearest_training_image"] = {
            "unit": "L2 over pixels in [-1, 1]",
            "percentiles": {
                name: {str(p): round(float(np.percentile(distances, p)), 3) for p in _PERCENTILES}
                for name, distances in (("test images", nearest.test), ("chains", nearest.chains))
            },
            "images": {"test images": len(nearest.test), "chains": len(nearest.chains)},
            "too_near": int((nearest.chains < nearest.limit).sum()),
            "chains_kept": count,
        }
    return about


def _short(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _short(value) if isinstance(value, dict) else value for name, value in values.items() if name not in _LONG
    }


def _card(name: str, facts: RunFacts, arrays: trained.Arrays, values: dict[str, Any], about: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    parts = [f"# {name}: a joint energy-based model", _use(name), _what(facts, arrays, about)]
    rows = "\n".join(
        "| {} | {} |".format(line.title.replace("|", "\\|"), line.cells["jem"])  # a bar would end the cell
        for line in summary.lines({"jem": values["jem"]})
    )
    rounding = about["rounding"]
    parts.append(
        f"## Results\n\n| of the checkpoint, on the test set | |\n| --- | --- |\n{rows}\n\n"
        f"Kernels are stored in float16. That changes the class of {rounding['changed']} of the first "
        f"{rounding['images']:,} test images; {rounding['accuracy']:.2%} of these are right as stored. "
        f"`{model_folder.FILE}` holds all that was measured."
    )
    if "nearest_training_image" in about:
        parts.append(_copies(about["nearest_training_image"], facts.config.data.flip))
    return "\n\n".join(parts) + "\n"


def _use(name: str) -> str:
    return (
        "```python\nimport jem_jax\n\n"
        f'logits, buffer, config = jem_jax.load("{name}")  # this folder\n'
        "```\n\n"
        "`logits` maps images [B, H, W, C] in [-1, 1] to [B, K]; `logits.in_chains` is for steps of SGLD."
    )


def _what(facts: RunFacts, arrays: trained.Arrays, about: dict[str, Any]) -> str:
    config, training = facts.config, about["training"]
    model = config.model
    kind = model.factory or f"WRN-{model.depth}-{model.width}, norm {model.norm}, {model.dtype}"
    data = _LICENCES.get(config.data.name, f"{config.data.name}; its licence is not known to this program")
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(arrays.variables["params"]))
    parts = training["seconds"].items()
    rows = {
        "Data": f"{data}. No image of it is in this folder.",
        "Images": "×".join(map(str, facts.image_shape))
        + f", {facts.num_classes} classes: "
        + ", ".join(facts.class_names),
        "Network": f"{kind}; {parameters:,} parameters",
        "Training": f"{arrays.step:,} iterations, {config.sampler.num_steps} SGLD steps each; "
        + ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts)
        + f"; {training['devices']}; seed {training['seed']}",
        "Versions": ", ".join(f"{package} {version}" for package, version in training["versions"].items()),
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {title} | {text} |" for title, text in rows.items())


def _copies(nearest: dict[str, Any], flip: bool) -> str:
    counts = nearest["images"]
    head = "| | images | " + " | ".join(f"{p} %" if p != 50 else "median" for p in _PERCENTILES) + " |"
    rows = "\n".join(
        f"| {name} | {counts[name]:,} | " + " | ".join(f"{values[str(p)]:.2f}" for p in _PERCENTILES) + " |"
        for name, values in nearest["percentiles"].items()
    )
    return (
        "## Are the buffer's chains copies of training images?\n\n"
        f"The distance to the nearest training image{', mirrored or not' if flip else ''}, L2 over pixels in [-1, 1]. "
        f"Its percentiles:\n\n{head}\n|{' --- |' * (2 + len(_PERCENTILES))}\n{rows}\n\n"
        f"{nearest['too_near']:,} chains were nearer than the test images' 1st percentile and are left out; "
        f"`buffer.npz` holds {nearest['chains_kept']:,}."
    )
