"""For the tests of trainings."""

import dataclasses
from collections.abc import Iterator

import pytest

from jem_jax.config import Recovery, Training
from jem_jax.training.setup import Setup
from jem_jax.training.step import Step


@pytest.fixture(scope="module")
def shared_steps() -> Iterator[None]:
    """Trainings of a module trace a step once: they take that of an earlier one with the same settings but for those
    that no step holds."""
    steps: dict[object, Step] = {}
    own_step = Setup.step
    others = ("epochs", "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every")
    same = {name: getattr(Training(), name) for name in others}

    def step(setup, program=None):
        config = setup.config
        limits = Recovery(max_gap=config.recovery.max_gap, patience=config.recovery.patience)
        settings = dataclasses.replace(config, training=dataclasses.replace(config.training, **same), recovery=limits)
        return steps.setdefault((settings, program), own_step(setup, program))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "step", step)
        yield
