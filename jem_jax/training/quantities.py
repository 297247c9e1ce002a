"""Quantities that follow from several settings: the objective's weights, sizes of buffer and chains, limits."""

import dataclasses
from typing import Any

from jem_jax import objective
from jem_jax.config import Config, Sampler
from jem_jax.training import divergence


def weights(config: Config) -> objective.Weights:
    """The objective's weights from the settings."""
    settings = config.objective
    return objective.Weights(
        p_x=settings.p_x, p_y_given_x=settings.p_y_given_x, p_xy=settings.p_xy, energy_l2=settings.energy_l2
    )


def chains(config: Config) -> int:
    """How many chains an iteration runs, all devices together."""
    terms = weights(config)
    unlabelled, labelled = config.training.batch_sizes
    return unlabelled * terms.needs_negatives + labelled * terms.needs_conditional_negatives


def buffer_classes(config: Config, num_classes: int) -> int:
    """The buffer's class axis: 1 unless some chain is class-conditional."""
    conditional = config.sampler.class_conditional or weights(config).needs_conditional_negatives
    return num_classes if conditional else 1


def buffer_size(config: Config, num_classes: int) -> tuple[int, int]:
    """Slots [S] and class axis [C] of the replay buffer; no slots where the objective needs no negatives."""
    if not weights(config).needs_samples:
        return 0, 1
    classes = buffer_classes(config, num_classes)
    return config.sampler.buffer_size // classes, classes


def chains_by_batch(config: Config) -> bool:
    """Whether chains after training use their batch's statistics, as its last ones did: not after a freeze.

    Of a run that freezes batch norm, a checkpoint from before the freeze counts as frozen too.
    """
    return config.sampler.batch_statistics and config.schedule.freeze_norm == 1


def limits(config: Config) -> divergence.Limits:
    """The limits of health that follow from the settings.

    energy_l2 holds back data and samples that a network tells apart without fail: the loss is least where log p~ of the
    ones is p_x / (2 energy_l2) and of the others its opposite. A gap counts from half of that on at the latest.
    """
    weights, max_gap = config.objective, config.recovery.max_gap
    if weights.p_x and weights.energy_l2:
        max_gap = min(max_gap, weights.p_x / weights.energy_l2 / 2)
    max_rms = divergence.MAX_CLIPPED_RMS if config.sampler.clip_x else divergence.MAX_RMS
    return divergence.Limits(max_gap, max_rms, config.recovery.patience)


def sgld_settings(sampler: Sampler) -> dict[str, Any]:
    """The keyword arguments of `sgld.chain` but for the number of steps."""
    return {
        "step_size": sampler.step_size,
        "noise_std": sampler.noise_std,
        "grad_clip": sampler.grad_clip or None,
        "bounds": (-1.0, 1.0) if sampler.clip_x else None,
    }


def classifier_config(config: Config) -> Config:
    """The same settings for a plain classifier that never saw a sample: cross-entropy alone, and from scratch."""
    weights = dataclasses.replace(config.objective, p_x=0.0, p_y_given_x=1.0, p_xy=0.0, energy_l2=0.0)
    training = dataclasses.replace(config.training, init_from="")
    return dataclasses.replace(config, objective=weights, training=training)
