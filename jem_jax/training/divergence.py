"""Signs that a training diverges, looked for in every iteration, as pure functions on arrays.

An iteration is *unfit* where its loss or gradients are not finite or its |log p~| runs away; it must not enter the
state. Four slower faults leave every number finite, and count once they have lasted for some iterations. Data and
samples lie too far apart in log p~. The samples of a batch have become alike, or have left the range of the data. The
classifier has forgotten what it knew. The watch records the first alarm, which the host reads later.

Devices exchange the images' moments rather than measures made of them, so that any number of devices decides alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MIN_SPREAD = 0.1
"""of the samples' standard deviation over a batch, as a fraction of the data's; healthy runs have more than 0.5"""
MAX_RMS = 3.0
"""of the root mean square of unclipped samples; the data lie in [-1, 1]"""
MAX_CLIPPED_RMS = 0.999
"""the same of samples that are clipped to [-1, 1]: nearly all of their values are -1 or 1"""
MIN_ACCURACY = 0.5
"""a classifier whose training accuracy never passed this has nothing to forget: small batches make such means noisy"""
_MEMORY = 20
"""iterations over which the training accuracy is averaged; a classifier thrown to chance is noticed in about as many"""
REASONS = {
    "not_finite": "the loss or a gradient was not finite",
    "log_density": "|log p~| passed config.training.max_log_density",
    "gap": "log p~ of data and samples stayed further apart than config.recovery.max_gap allows",
    "collapse": f"the samples' standard deviation over a batch stayed below {MIN_SPREAD:g} of the data's",
    "saturation": f"the samples' root mean square stayed above {MAX_RMS:g} ({MAX_CLIPPED_RMS:g} for clipped chains)",
    "forgotten": "the training accuracy fell to less than half of its best",
}
"""reasons of an alarm; the first two undo the iteration, the others must have lasted"""
_SUDDEN = 2
_LARGEST = 1e18
"""the largest number that counts as finite. The squares of such gradients, and their sums, are finite too, so the
parameters and the optimiser's state need no check of their own, which would read them all once more"""


@dataclass(frozen=True)
class Limits:
    """Limits of health."""

    max_gap: float
    """of |mean log p~(data) - mean log p~(samples)|, in nats"""
    max_rms: float
    """of the samples' root mean square, where the data lie in [-1, 1]; never less than the data's own"""
    patience: int
    """iterations on end that a slow fault may last"""


class Watch(NamedTuple):
    """The watch's state between iterations."""

    reason: Array
    """int32 []: which of `REASONS` the first alarm was about, or -1"""
    step: Array
    """int32 []: the iteration of the first alarm, or -1"""
    counts: Array
    """int32 [4]: for how many iterations on end each of the slow faults has been there"""
    accuracy: Array
    """float32 []: the training accuracy's exponential average"""
    best_accuracy: Array
    """float32 []: the largest that it has been"""


class Moments(NamedTuple):
    """First and second moments of a device's images; their means over the devices are those of the whole batch."""

    data_mean: Array
    """[H, W, C]: each value's mean over the images"""
    data_square: Array
    """[]: the mean square of all values"""
    samples_mean: Array
    samples_square: Array


class Health(NamedTuple):
    """A device's signs of an iteration. Their mean over devices is above 0 if any device saw the fault."""

    not_finite: Array
    """float32 []: 0 or 1"""
    runaway: Array
    """float32 []: 0 or 1"""
    moments: Moments | None
    """None where there are no samples"""


class Alarm(NamedTuple):
    """A first alarm, on the host."""

    reason: str
    """one of `REASONS`"""
    step: int
    """the iteration, counted from 0"""


def initial_watch() -> Watch:
    """The watch before the first iteration."""
    never, unknown = np.int32(-1), np.float32(0)
    values: Any = never, never, np.zeros(len(REASONS) - _SUDDEN, np.int32), unknown, unknown
    return Watch(*values)


def health(values: Any, log_px_max: Array, max_log_density: float, moments: Moments | None) -> Health:
    """This device's signs of divergence.

    Args:
      values: a pytree of all that must be finite.
      log_px_max: [] the largest |log p~| of any image.
      max_log_density: what that may be.
      moments: of the data and samples.
    """
    not_finite = ~(finite(values) & jnp.isfinite(log_px_max))
    runaway = log_px_max > max_log_density
    return Health(not_finite.astype(jnp.float32), runaway.astype(jnp.float32), moments)


def moments(data: Array, samples: Sequence[Array]) -> Moments | None:
    """Moments of data [B, H, W, C] and of batches of samples [B', H, W, C]; None where there are no samples."""
    if not samples:
        return None
    together = jnp.concatenate(samples)
    return Moments(
        jnp.mean(data, axis=0), jnp.mean(jnp.square(data)), jnp.mean(together, axis=0), jnp.mean(jnp.square(together))
    )


def measures(moments: Moments | None) -> dict[str, Array]:
    """`samples_spread`, the samples' standard deviation over the batch as a fraction of the data's, and the root mean
    squares `samples_rms` and `data_rms`.

    Args:
      moments: their means over all devices.
    """
    if moments is None:
        return {}
    spread = lambda mean, square: jnp.sqrt(jnp.maximum(square - jnp.mean(jnp.square(mean)), 0))  # noqa: E731
    of_data = spread(moments.data_mean, moments.data_square)
    of_samples = spread(moments.samples_mean, moments.samples_square)
    # A batch without any spread, of a single image, has nothing to compare with.
    ratio = jnp.where(of_data > 0, of_samples / jnp.maximum(of_data, 1e-12), 1.0)
    return {
        "samples_spread": ratio,
        "samples_rms": jnp.sqrt(moments.samples_square),
        "data_rms": jnp.sqrt(moments.data_square),
    }


def finite(tree: Any) -> Array:
    """Whether every number of a pytree is, and far from overflow as well. -> bool []."""
    return jnp.all(jnp.stack([(jnp.abs(leaf) <= _LARGEST).all() for leaf in jax.tree.leaves(tree)]))


def watched(
    watch: Watch, step: Array, not_finite: Array, runaway: Array, metrics: Mapping[str, Array], limits: Limits
) -> Watch:
    """The watch after an iteration.

    Args:
      watch: before it.
      step: its number.
      not_finite: [] bool.
      runaway: [] bool.
      metrics: means over the whole batch: `measures`, and accuracy and log p~ as `objective.joint_loss` names them.
    """
    unfit = not_finite | runaway
    accuracy = watch.accuracy + (metrics["accuracy"] - watch.accuracy) / _MEMORY
    best = jnp.maximum(watch.best_accuracy, accuracy)
    forgotten = (best > MIN_ACCURACY) & (accuracy < best / 2)
    counts = jnp.where(jnp.append(_sampling_faults(metrics, limits), forgotten), watch.counts + 1, 0)
    # An iteration that is undone says nothing about the state that it leaves.
    counts, accuracy, best = (
        jnp.where(unfit, old, new)
        for old, new in ((watch.counts, counts), (watch.accuracy, accuracy), (watch.best_accuracy, best))
    )
    alarms = jnp.concatenate([jnp.stack([not_finite, runaway]), (counts >= limits.patience) & ~unfit])
    first = (watch.step < 0) & jnp.any(alarms)
    return Watch(
        reason=jnp.where(first, jnp.argmax(alarms).astype(jnp.int32), watch.reason),
        step=jnp.where(first, step, watch.step),
        counts=counts,
        accuracy=accuracy,
        best_accuracy=best,
    )


def alarm(watch: Watch) -> Alarm | None:
    """The first alarm, read from the device; None where there was none."""
    reason, step = (int(value) for value in jax.device_get((watch.reason, watch.step)))
    return None if reason < 0 else Alarm(list(REASONS)[reason], step)


def _sampling_faults(metrics: Mapping[str, Array], limits: Limits) -> Array:
    """bool [3]: whether this iteration shows a gap, a collapse, a saturation."""
    never = jnp.array(False)
    gaps = []
    if "log_px_data" in metrics:
        gaps.append(jnp.abs(metrics["log_px_data"] - metrics["log_px_samples"]))
    if "contrast_xy" in metrics:
        gaps.append(jnp.abs(metrics["contrast_xy"]))
    if not gaps:
        return jnp.stack([never, never, never])
    # Images of nothing but black and white are as far out as samples can be.
    max_rms = jnp.maximum(limits.max_rms, metrics["data_rms"])
    healthy = [
        jnp.max(jnp.stack(gaps)) <= limits.max_gap,
        metrics["samples_spread"] >= MIN_SPREAD,
        metrics["samples_rms"] <= max_rms,
    ]
    # A comparison with NaN is false, so that the negation counts NaN as a fault.
    return ~jnp.stack(healthy)
