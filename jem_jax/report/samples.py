"""Shows samples, their quality and inpainting, which `evaluation` computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jem_jax import replay_buffer
from jem_jax.augment import to_float
from jem_jax.common import paths
from jem_jax.distributed import devices
from jem_jax.evaluation import classification, fid, inpainting, sample_quality, sampling
from jem_jax.report.inputs import (
    TITLES,
    Subject,
    chain_batch,
    chains_in_words,
    how_chains_pass,
    sample_steps,
    start_of_chains,
)
from jem_jax.report.result import Result, percent
from jem_jax.runs import image_grid
from jem_jax.runs.workdir import RunFacts

PICTURES = ("samples_by_class.png", "samples.png", "buffer_by_class.png")
"""what a person looks at first"""
_PER_CLASS = 10
_SHOWN = 100
_EXTREMES = 20
_STRIP_CHAINS = 8
_NEIGHBOURS = 10
_INPAINTED = 20
_QUALITY_IMAGES = 2000
_INPAINT_STREAM = 105


def draw_fresh(folder: Path, fresh: Mapping[str, np.ndarray], facts: RunFacts) -> list[Path]:
    """Pictures of `subject.fresh_chains`, ten of a class and a hundred of none; their files."""
    rows = [images[:_PER_CLASS] for images in fresh["by_class"].reshape(facts.num_classes, -1, *facts.image_shape)]
    return [
        image_grid.save(image_grid.grid(rows, facts.class_names), folder / PICTURES[0]),
        image_grid.save(image_grid.grid(_rows(fresh["unconditional"][:_SHOWN])), folder / PICTURES[1]),
    ]


def draw_buffer(folder: Path, images: np.ndarray, logits: np.ndarray, facts: RunFacts) -> Path:
    """A picture of the replay buffer, by predicted class: the first of each, none chosen."""
    rows = sampling.by_class(images, logits, _PER_CLASS)
    return image_grid.save(image_grid.grid(rows, facts.class_names), folder / PICTURES[2])


def draw(subject: Subject) -> Result:
    """Samples of every kind: afresh, by class, from the buffer, the most and least dense, and a chain's film strip."""
    facts, folder = subject.facts, subject.folder
    steps = sample_steps(facts.config)
    start = start_of_chains(facts.config)
    passing = chains_in_words(facts.config)
    fresh = {kind: states[:, -1] for kind, states in subject.fresh.items()}
    files = draw_fresh(folder, fresh, facts)
    result = Result(how={"steps": steps, "start": start, "seed": facts.config.seed, **how_chains_pass(facts.config),
                         "images": {name: len(images) for name, images in fresh.items()}})  # fmt: skip
    result.images(
        files[0], f"Chains that began as {start} and followed one class's logit, ∇ f(x)[y], for {steps} steps.{passing}"
    )
    result.images(
        files[1],
        f"Chains that began as {start} and followed ∇ log p~(x) for {steps} steps, whatever the class.{passing}",
    )
    densities = {"test image": (subject.test, _log_density(subject.test_logits["jem"]))}
    if subject.jem.buffer is not None:
        images = subject.jem.buffer.reshape(-1, *facts.image_shape)
        logits = subject.logits("jem", images)
        densities["buffer sample"] = (images, _log_density(logits))
        result.images(
            draw_buffer(folder, images, logits, facts),
            f"The replay buffer, by predicted class: the first {_PER_CLASS} of {len(images)} in each, none chosen.",
        )
    rows: list[np.ndarray] = []
    names: list[str] = []
    for kind, (images, density) in densities.items():
        order = np.argsort(density)
        for title, chosen in (("highest", order[::-1]), ("lowest", order)):
            rows.append(images[chosen[:_EXTREMES]])
            names.append(f"{kind}s, {title}")
    result.images(
        image_grid.save(image_grid.grid(rows, names), folder / "density_extremes.png"),
        f"The {_EXTREMES} images of the highest and the lowest log p~(x) by the JEM.",
    )
    film = image_grid.grid(list(subject.fresh["unconditional"][:_STRIP_CHAINS]))
    result.images(
        image_grid.save(film, folder / "film_strip.png"),
        f"{_STRIP_CHAINS} of these chains from {start} (left) to step {steps} (right).{passing}",
    )
    return result


def quality(subject: Subject) -> Result:
    """Samples measured by the feature model, and whether they are copies of training images."""
    facts, feature_model = subject.facts, subject.feature_model
    train = subject.dataset.train
    indices = np.random.default_rng(facts.config.seed).permutation(len(train))[:_QUALITY_IMAGES]
    reference = to_float(train.images[indices])
    sources = {"test images": subject.test[:_QUALITY_IMAGES]}
    if subject.jem.buffer is not None:
        buffer = np.clip(subject.jem.buffer.reshape(-1, *facts.image_shape), -1, 1)
        sources["replay buffer"] = buffer[:: max(1, len(buffer) // _QUALITY_IMAGES)][:_QUALITY_IMAGES]
    sources["fresh chains"] = np.clip(subject.fresh["unconditional"][:, -1], -1, 1)
    noise = np.random.default_rng(facts.config.seed).uniform(-1, 1, (500, *facts.image_shape))
    sources["uniform noise"] = noise.astype(np.float32)
    result = Result(how={
        "network": f"the {TITLES[feature_model]}'s penultimate features and predictions; neither FID nor Inception "
                   "score",
        "reference": f"{len(indices)} training images", "values": "clipped to [-1, 1]",
        "fresh_chains": {"steps": sample_steps(facts.config), "start": start_of_chains(facts.config),
                         **how_chains_pass(facts.config)},
    })  # fmt: skip
    reference_features = subject.described(feature_model, reference)[1]
    described = {name: subject.described(feature_model, images) for name, images in sources.items()}
    values = {
        name: _quality(images, *described[name], reference, reference_features)
        for name, images in sources.items()
        if len(images) > 1
    }
    result.models["jem"] = {"sample_quality": values}
    rows = [
        (name, str(row["images"]), f"{row['frechet_distance']:.3g}", f"{row['inception_style_score']:.2f}",
         percent(row["mean_confidence"]), f"{percent(row['rarest_class'])} to {percent(row['commonest_class'])}",
         f"{row['median_nearest_pixels']:.2f}")
        for name, row in values.items()
    ]  # fmt: skip
    result.text(
        f"The feature model is the {TITLES[feature_model]}, by its penultimate features and predictions. These are "
        f"neither FID nor Inception scores and compare only within this table. Reference: {len(indices)} training "
        "images. A Fréchet distance is larger where there are fewer images. Fresh chains began as "
        f"{start_of_chains(facts.config)} and took {sample_steps(facts.config)} steps.{chains_in_words(facts.config)}"
    )
    if few := sources.keys() - values.keys():
        result.text(f"Of {', '.join(sorted(few))} there is a single image, which has no spread to compare.")
    head = ("", "images", "Fréchet distance", "Inception-style score", "mean confidence", "class shares",
            "median distance to the nearest training image")  # fmt: skip
    result.table(head, rows, "distance in [-1, 1] pixels, L2; values clipped to [-1, 1]")
    _inception(subject, result)
    result.images(
        _neighbours(subject, sources["fresh chains"], described["fresh chains"][1], reference, reference_features),
        "Are samples copies? Each sample over its nearest reference image by pixels, and by the feature model.",
    )
    return result


def _inception(subject: Subject, result: Result) -> None:
    """FID and Inception score of the whole buffer against all training images, where Inception-v3 is there."""
    weights, buffer, train = subject.settings.inception_weights, subject.jem.buffer, subject.dataset.train
    if not weights or buffer is None:
        result.text("FID and Inception score were not measured: config.evaluation.inception_weights names no file.")
        return
    images = buffer.reshape(-1, *subject.facts.image_shape)
    try:
        scores = fid.measure(images, train.images, paths.local("config.evaluation.inception_weights", weights))
    except fid.Unavailable as error:
        result.text(f"FID and Inception score could not be measured: {error}.")
        return
    result.models["jem"]["inception"] = {**scores._asdict(), "images": len(images), "reference": len(train)}
    result.how["inception"] = (
        "torch-fidelity's Inception-v3; the whole buffer, none chosen, against all training images"
    )
    result.text(
        f"Inception-v3: FID {scores.fid:.2f} and Inception score {scores.inception_score:.2f} of the whole buffer, "
        f"{len(images)} images, none chosen, against all {len(train)} training images without augmentation."
    )


def inpaint(subject: Subject) -> Result:
    """Hidden pixels sampled given the others, and the error beside filling in the training images' mean."""
    facts, steps = subject.facts, sample_steps(subject.facts.config)
    images = to_float(subject.some_test(max(_INPAINTED, chain_batch(facts.config))).images)
    mean = to_float(subject.dataset.train.images).mean(axis=0)
    start_key, chain_key = jax.random.split(subject.key(_INPAINT_STREAM))
    uniform = devices.once(lambda key: replay_buffer.uniform(key, len(images), facts.image_shape))
    noise = np.asarray(uniform(start_key))
    result = Result(how={"images": len(images), "steps": steps, "error": "root mean square of hidden pixels, [0, 1]",
                         **how_chains_pass(facts.config)})  # fmt: skip
    masks = inpainting.masks(facts.image_shape)
    known = np.concatenate([np.broadcast_to(mask, images.shape) for mask in masks.values()])
    hidden = np.where(known, np.concatenate([images] * len(masks)), np.concatenate([noise] * len(masks)))
    ends = subject.sampler(chain_key, hidden, known=known)[:, -1]
    pictured, names, rows, values = [images[:_INPAINTED]], ["original"], [], {}
    for (name, known), filled in zip(masks.items(), np.split(ends, len(masks)), strict=True):
        by_mean = np.where(known, images, mean)
        values[name] = {"sampled": inpainting.error(images, filled, known),
                        "mean_image": inpainting.error(images, by_mean, known)}  # fmt: skip
        rows.append((name, f"{values[name]['sampled']:.3f}", f"{values[name]['mean_image']:.3f}"))
        pictured += [np.where(known, images, 0)[:_INPAINTED], filled[:_INPAINTED]]
        names += [f"{name} hidden", "sampled"]
    result.models["jem"] = {"inpainting": values}
    result.text(
        "One sample for each image. A sample errs even where the model is right, since it commits itself to one of "
        "many possibilities, while the mean image is the blur that makes the squared error small."
    )
    result.table(("hidden", "sampled", "mean training image"), rows, "root mean squared error of hidden pixels, [0, 1]")
    result.images(
        image_grid.save(image_grid.grid(pictured, names), subject.folder / "inpainting.png"),
        f"Hidden pixels (grey) filled in by {steps} SGLD steps with the known ones held fixed."
        + chains_in_words(facts.config),
    )
    return result


def _quality(
    images: np.ndarray, logits: np.ndarray, features: np.ndarray, reference: np.ndarray, reference_features: np.ndarray
) -> dict[str, Any]:
    log_posterior = classification.log_posterior(logits)
    _, distances = sample_quality.nearest(images, reference)
    return {
        **sample_quality.measures(log_posterior, features, reference_features),
        "class_shares": sample_quality.class_shares(log_posterior).tolist(),
        "median_nearest_pixels": float(np.median(distances)),
    }


def _neighbours(
    subject: Subject, samples: np.ndarray, features: np.ndarray, reference: np.ndarray, reference_features: np.ndarray
) -> Path:
    samples, features = samples[:_NEIGHBOURS], features[:_NEIGHBOURS]
    by_pixels, _ = sample_quality.nearest(samples, reference)
    by_features, _ = sample_quality.nearest(features, reference_features)
    rows = [samples, reference[by_pixels], reference[by_features]]
    names = ("sample", "nearest by pixels", "nearest by features")
    return image_grid.save(image_grid.grid(rows, names), subject.folder / "nearest_training_images.png")


def _log_density(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(axis=-1)
    return largest + np.log(np.exp(logits.astype(np.float64) - largest[:, None]).sum(axis=-1))


def _rows(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + 10] for start in range(0, len(images), 10)]
