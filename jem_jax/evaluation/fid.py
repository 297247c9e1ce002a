"""FID and Inception score by torch-fidelity, whose Inception-v3 is the one that published figures were taken with.

Nothing is downloaded: the weights are a file that someone has fetched (torch-fidelity's release
`weights-inception-2015-12-05-6726825d.pth`), and the package is installed by hand.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jem_jax.augment import to_uint8


class Figures(NamedTuple):
    """Measures of samples by Inception-v3."""

    fid: float
    """Fréchet distance to the reference (Heusel et al. 2017); smaller is better, and larger with fewer images"""
    inception_score: float
    """exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016), mean of ten parts"""


class Unavailable(Exception):
    """Inception-v3 cannot be had here; says what to install or fetch."""


def measure(samples: np.ndarray, reference: np.ndarray, weights: Path) -> Figures:
    """FID and Inception score of samples.

    Args:
      samples: [N, H, W, C] in [-1, 1]; clipped, rounded to uint8, grey ones repeated to three channels.
      reference: [M, H, W, C] uint8, what the FID is taken against.
      weights: torch-fidelity's file.

    Raises:
      Unavailable: torch-fidelity or the file is missing.
    """
    if not weights.is_file():
        raise Unavailable(f"config.evaluation.inception_weights {weights} is not a file")
    try:
        torch, fidelity = (importlib.import_module(name) for name in ("torch", "torch_fidelity"))
    except ImportError as error:
        raise Unavailable(f"{error.name} is missing: pip install torch-fidelity") from error
    scores = fidelity.calculate_metrics(
        input1=_images(torch, to_uint8(samples)),
        input2=_images(torch, reference),
        fid=True,
        isc=True,
        feature_extractor_weights_path=str(weights),
        cuda=torch.cuda.is_available(),
        verbose=False,
    )
    return Figures(float(scores["frechet_inception_distance"]), float(scores["inception_score_mean"]))


def _images(torch: Any, pixels: np.ndarray) -> Any:
    """As torch-fidelity takes them: a data set of uint8 tensors [3, H, W]."""
    coloured = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    array = np.ascontiguousarray(coloured.transpose(0, 3, 1, 2))

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(array)

        def __getitem__(self, number: int) -> Any:
            return torch.from_numpy(array[number])

    return Images()
