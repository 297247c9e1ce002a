"""Joint Energy-based Models in JAX: a classifier that is also an energy-based model of its inputs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jem_jax.training.trained import Loaded

__version__ = "0.1.0"


def load(workdir: str | os.PathLike[str], *, baseline: bool = False, best: bool = False) -> Loaded:
    """A trained model, as functions and arrays: `logits, buffer, config = jem_jax.load("runs/digits")`.

    Args:
      workdir: of a run; or a model folder, such as experiments/models/fashion_mnist.
      baseline: the plain classifier that was trained beside it; its buffer is None.
      best: the checkpoint of the best validation accuracy rather than the last; its buffer is None.

    Returns:
      A named tuple: `logits`, x [B, H, W, C] float32 in [-1, 1] -> [B, K], which works under jit, grad, vmap and pmap,
        and `logits.in_chains` for the steps of chains;
      `buffer` [S, classes or 1, H, W, C] float32 or None; `config`, the frozen settings.

    Raises:
      jem_jax.common.errors.UserError: there is no run, no finished checkpoint, or it is damaged; of `logits`: images of
        another shape, or integers.
    """
    from jem_jax.training import trained

    return trained.load(workdir, baseline=baseline, best=best)
