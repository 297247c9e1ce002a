"""Samples as files that other programs read: a folder of PNGs and an .npz of each kind, as FID tools take them."""

from pathlib import Path

import numpy as np
from PIL import Image

from jem_jax.augment import to_uint8
from jem_jax.common import files
from jem_jax.datasets import Dataset
from jem_jax.report import samples
from jem_jax.report.inputs import Sampler, fresh_chains
from jem_jax.runs import workdir
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import network
from jem_jax.training.trained import Model

_FOLDER = "export"


def write(folder: Path, model: Model, facts: RunFacts, dataset: Dataset) -> list[Path]:
    """Draws samples and writes them, pictures of some and all of them as files; an older export is deleted.

    Kinds are "unconditional" (fresh chains along ∇ log p~(x)), "by_class" (fresh chains along ∇ f(x)[y]) and "buffer"
    (the whole replay buffer). Under export/, KIND.npz holds `arr_0`, uint8 [N, H, W, 3], and for "by_class" the
    classes as `arr_1` [N]; KIND/000000.png and so on are the same images.

    Returns:
      What a person may want to look at.
    """
    states = fresh_chains(Sampler(facts.config, model), facts, dataset)
    images_of = {kind: chains[:, -1] for kind, chains in states.items()}
    shown = samples.draw_fresh(folder, images_of, facts)
    if model.buffer is not None:
        images_of["buffer"] = model.buffer.reshape(-1, *facts.image_shape)
        batch_size = facts.config.evaluation.batch_size
        logits, _ = network.describe(model.network, model.variables, images_of["buffer"], batch_size)
        shown.append(samples.draw_buffer(folder, images_of["buffer"], logits, facts))
    target = folder / _FOLDER
    files.remove(target, workdir.EXPORTS)
    for kind, images in images_of.items():
        per_class = len(images) // facts.num_classes
        labels = np.repeat(np.arange(facts.num_classes), per_class) if kind == "by_class" else None
        shown.append(_write_kind(target / kind, images, labels))
    return shown


def _write_kind(folder: Path, images: np.ndarray, labels: np.ndarray | None) -> Path:
    """The images as PNGs in a folder, and beside it as an .npz, which is returned."""
    pixels = to_uint8(images)
    pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    arrays = [pixels] if labels is None else [pixels, labels]
    path = folder.with_suffix(".npz")
    with files.whole(path) as partial, partial.open("wb") as file:
        np.savez(file, *arrays)
    return path
