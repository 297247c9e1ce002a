"""Changes during a run: its phases, each with a compiled program, and the weight of p(x)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jem_jax.common.errors import UserError
from jem_jax.config import Config, Schedule
from jem_jax.training.quantities import weights

MOST_PROGRAMS = 4
"""of a run without recoveries; all are compiled before the first iteration"""


class Program(NamedTuple):
    """Constants of a compiled step."""

    needs_samples: bool
    """whether p(x) is learned; without it the step is a classifier's"""
    num_steps: int
    """SGLD steps K; 0 without samples"""
    sam: bool
    """whether the gradient is taken at the ascended weights"""
    frozen: bool
    """whether batch norm uses its running statistics throughout, as in evaluation"""


class Phase(NamedTuple):
    """A stretch of iterations with one program."""

    first: int
    """the first of them, counted from 0"""
    program: Program


def phases(config: Config, total_steps: int) -> tuple[Phase, ...]:
    """The phases of a run in order; the first begins at iteration 0.

    Raises:
      UserError: they need more than `MOST_PROGRAMS` programs.
    """
    schedule = config.schedule
    shares = {0.0, schedule.p_x_start, schedule.sam_start, schedule.freeze_norm, *schedule.num_steps[::2]}
    result: list[Phase] = []
    for share in sorted(share for share in shares if share < 1):
        first, program = round(share * total_steps), _program(config, share)
        if result and result[-1].first == first:
            result.pop()
        if not result or result[-1].program != program:
            result.append(Phase(first, program))
    count = len({phase.program for phase in result})
    if count > MOST_PROGRAMS:
        raise UserError(
            f"config.schedule needs {count} compiled programs, more than {MOST_PROGRAMS}; let shares coincide"
        )
    return tuple(result)


def _program(config: Config, share: float) -> Program:
    schedule = config.schedule
    needs_samples = weights(config).needs_samples and share >= schedule.p_x_start
    num_steps = config.sampler.num_steps
    for since, steps in schedule.chain_steps:
        num_steps = steps if share >= since else num_steps
    return Program(
        needs_samples=needs_samples,
        num_steps=num_steps if needs_samples else 0,
        sam=bool(config.optimizer.sam_rho) and share >= schedule.sam_start,
        frozen=share >= schedule.freeze_norm,
    )


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase of an iteration, counted from 0."""
    return max((phase for phase in phases if phase.first <= step), key=lambda phase: phase.first)


def p_x_factor(settings: Schedule, total_steps: int, step: Array | int) -> Array:
    """The factor of the weight of p(x) in an iteration: 0, a linear ramp, then 1. float32 []."""
    start, ramp = round(settings.p_x_start * total_steps), round(settings.p_x_ramp * total_steps)
    # The first iteration of a ramp already counts, so that no chain is run for a weight of 0.
    risen = (jnp.asarray(step) - start + 1) / max(ramp, 1)
    return jnp.clip(risen.astype(jnp.float32), 0, 1)
