"""What the models that come with the code can do, within a minute on two CPU cores each: a picture and a few numbers.

    python experiments/shipped_model.py
    python experiments/shipped_model.py experiments/models/fashion_mnist --images cat.jpg dog.png

For every model folder (experiments/models/* by default): two chains of each class go on from the replay buffer for 20
steps of SGLD. The lower halves of eight images are filled in by as many steps from a linear guess. log p~(x) and the
confidence max p(y | x) of images inside and outside are compared. The images inside are the user's, cropped and
resized; else sixteen of Fashion-MNIST's test images (Xiao et al. 2017, MIT licence) for a model of them; else chains of
the buffer, since other data sets are not shipped.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

import jem_jax
from jem_jax import energy, sgld
from jem_jax.augment import to_float, to_uint8
from jem_jax.config import Data
from jem_jax.datasets import Split, ood_sets
from jem_jax.runs import image_grid
from jem_jax.training.quantities import sgld_settings
from jem_jax.training.trained import Loaded

MODELS = Path(__file__).parent / "models"
STEPS = 20
PER_CLASS, INPAINTED, JUDGED = 2, 8, 16
CONSIDERED = 200
"""chains of the buffer, of which the best of each class go on"""
RIDGE = 1.0
"""variance below which directions of the buffer's Gaussian say nothing of hidden pixels"""
OUTSIDE = ("inverted", "photographs", "uniform_noise", "constant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="model folders; default: all of experiments/models")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="pictures to fill in and to judge")
    parser.add_argument("--out", type=Path, default=Path("runs/shipped_model"), help="folder of the pictures")
    flags = parser.parse_args()
    for folder in flags.models or sorted(path for path in MODELS.iterdir() if path.is_dir()):
        started = time.monotonic()
        print(f"{folder}:", flush=True)
        picture = show(jem_jax.load(folder), flags.images, flags.out / f"{folder.name}.png")
        print(f"  {picture}, after {time.monotonic() - started:.0f} s", flush=True)


def show(model: Loaded, pictures: list[Path], path: Path) -> Path:
    """Draws one model's picture, and prints what it makes of images inside and outside."""
    buffer = np.asarray(model.buffer).reshape(-1, *model.buffer.shape[2:])
    chains = buffer[:: -(-len(buffer) // CONSIDERED)]
    title, inside = _inside(model, chains, pictures)
    judged = {title: inside, **_outside(inside)}
    # One program gives all logits, and another all chains: compiling takes a third of the time.
    logits = np.asarray(jax.jit(model.logits)(np.concatenate([chains, *judged.values()])))
    starts, labels = _starts(chains, logits[: len(chains)])
    shown = inside[:INPAINTED]
    ends, filled = sample(model, starts, labels, shown, guess(buffer, shown, _known(shown)))
    rows = [*(ends[i::PER_CLASS] for i in range(PER_CLASS)), shown, np.where(_known(shown), shown, 0), filled]
    names = [f"{STEPS} steps from the buffer, by class"] * PER_CLASS
    names += [title, "lower half hidden", f"filled in by {STEPS} steps"]
    ends_of_parts = np.cumsum([len(chains), *map(len, judged.values())])
    for (title, images), part in zip(judged.items(), np.split(logits, ends_of_parts)[1:-1], strict=True):
        density = float(energy.log_density(part).mean())
        confidence = float(jnp.exp(energy.log_posterior(part)).max(axis=-1).mean())
        print(f"  {title:<30} log p~ {density:6.2f}   confidence {confidence:6.1%}", flush=True)
        rows.append(images[:INPAINTED])
        names.append(f"{title}, log p~ {density:.1f}, {confidence:.0%}")
    return image_grid.save(image_grid.grid(rows, names), path)


def sample(
    model: Loaded, starts: np.ndarray, labels: np.ndarray, images: np.ndarray, guesses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chains of classes, and images whose hidden half follows ∇ log p~(x): all in one batch, compiled once.

    Args:
      starts: [N, H, W, C], labels: [N].
      images: [M, H, W, C].
      guesses: [M, H, W, C], where hidden pixels begin.

    Returns:
      The chains' ends [N, H, W, C], and the images filled in [M, H, W, C].
    """
    known = np.concatenate([np.zeros(starts.shape, bool), _known(images)])
    given = jnp.concatenate([starts, images])
    of_class = jnp.arange(len(given)) < len(starts)
    labels = jnp.concatenate([labels, jnp.zeros(len(images), int)])
    whole = lambda x: jnp.where(known, given, x)  # noqa: E731

    def log_density(x: jax.Array) -> jax.Array:
        logits = model.logits.in_chains(whole(x))
        return jnp.where(of_class, energy.joint_log_density(logits, labels), energy.log_density(logits))

    @jax.jit
    def run(key: jax.Array, x: jax.Array) -> jax.Array:
        settings = sgld_settings(model.config.sampler)
        return whole(sgld.chain(key, log_density, x, num_steps=STEPS, **settings))

    ends = np.asarray(run(jax.random.key(0), jnp.concatenate([starts, guesses])))
    return ends[: len(starts)], ends[len(starts) :]


def guess(chains: np.ndarray, images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The mean of hidden pixels given the known ones, under a Gaussian of the buffer's chains.

    Args:
      chains: [N, H, W, C].
      images, known: [M, H, W, C]; all images know the same pixels.

    Returns:
      [M, H, W, C].
    """
    flat, mask = chains.reshape(len(chains), -1), known[0].reshape(-1)
    mean = flat.mean(axis=0)
    spread = (flat - mean) / np.sqrt(len(flat))
    seen = spread[:, mask]
    offsets = (images.reshape(len(images), -1) - mean)[:, mask]
    weights = np.linalg.solve(seen @ seen.T + RIDGE * np.eye(len(seen)), seen @ offsets.T)
    return (mean + weights.T @ spread).reshape(images.shape).astype(np.float32)


def _starts(chains: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each class the chains that are taken for it with the largest logits, and the classes [N]."""
    labels = np.repeat(np.arange(logits.shape[-1]), PER_CLASS)
    best = np.argsort(-(logits - np.asarray(energy.log_density(logits))[:, None]), axis=0)[:PER_CLASS]
    return chains[best.T.reshape(-1)], labels


def _inside(model: Loaded, chains: np.ndarray, pictures: list[Path]) -> tuple[str, np.ndarray]:
    """Images such as the model was trained on, and what they are."""
    height, width, channels = chains.shape[1:]
    if pictures:
        fitted = [
            ImageOps.fit(Image.open(path).convert("L" if channels == 1 else "RGB"), (width, height))
            for path in pictures
        ]
        return "your images", to_float(
            np.stack([np.asarray(image).reshape(height, width, channels) for image in fitted])
        )
    shipped = MODELS / f"{model.config.data.name}_test.npz"
    if shipped.exists():
        return "test images", to_float(np.load(shipped, allow_pickle=False)["images"])
    return "chains of the buffer", chains[-JUDGED:]


def _outside(inside: np.ndarray) -> dict[str, np.ndarray]:
    split = Split(to_uint8(inside), np.zeros(len(inside), np.int32))
    made = ood_sets.builtin(split, JUDGED, seed=0)
    digits = ood_sets.named(Data(), "digits", inside.shape[1:], JUDGED, seed=0)
    return {"handwritten digits": digits.images, **{name.replace("_", " "): made[name].images for name in OUTSIDE}}


def _known(images: np.ndarray) -> np.ndarray:
    known = np.ones(images.shape, bool)
    known[:, images.shape[1] // 2 :] = False
    return known


if __name__ == "__main__":
    main()
