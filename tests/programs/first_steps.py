"""The first iterations of tiny runs, on as many devices as JAX_NUM_CPU_DEVICES says.

    python -m programs.first_steps STARTS OUT.npz

STARTS/<run> holds a checkpoint of each run's start, from any number of devices.
"""

import sys
from pathlib import Path

import numpy as np
import tiny

from jem_jax.config import Config
from jem_jax.distributed import devices
from jem_jax.runs import checkpoint
from jem_jax.training import trained
from jem_jax.training.state import TrainState
from jem_jax.training.step import Step

RUNS = {
    # Without a leaky ReLU's kink, which another rounding can turn the other way: a gradient's fourth digit.
    "wrn": {"model.activation": "swish"},
    "every_term": {
        "model.factory": "tiny:mlp",
        "objective.p_xy": 0.5,
        "objective.energy_l2": 0.1,
        "sampler.class_conditional": True,
        "sampler.buffer_size": 48,
        "optimizer.weight_decay": 0.01,
        "recovery.max_gap": 1e-9,
        "recovery.patience": 2,
    },
    "successors": {
        "model.factory": "tiny:mlp",
        "data.augment_p_x": False,
        "sampler.init": "class_gaussians",
        "sampler.reinit_prob": 0.5,
        "sampler.clip_x": True,
        "optimizer.sam_rho": 0.5,
        "optimizer.sam_adaptive": True,
        "training.labelled_batch_size": 16,
    },
}
_STEPS = 3


def first_steps(step: Step, state: TrainState, chains: np.ndarray, data: tiny.DeviceData) -> dict[str, np.ndarray]:
    """The summed metrics after every iteration; at the end parameters, optimiser state, watch and the whole buffer."""
    results, buffer = {}, devices.shard_buffer(chains)
    for number in range(_STEPS):
        state, buffer = step(state, buffer, data.at(number))
        results |= {f"{number}/{name}": value for name, value in tiny.leaves(state.window.sums).items()}
    end = {"params": state.params, "opt_state": state.opt_state, "buffer": tiny.whole(buffer), "watch": state.watch}
    return results | tiny.leaves(end)


def template(config: Config) -> tuple[TrainState, dict]:
    """The shapes of a run's state, and of a checkpoint of it."""
    state, buffer = trained.template(config, (tiny.SIDE, tiny.SIDE, 1), tiny.CLASSES)
    return state, trained.tree(checkpoint.template_of(state), buffer)


def _main(starts: Path, out: Path) -> None:
    results = {}
    for run, settings in RUNS.items():
        config = tiny.config(**settings)
        shapes, tree = template(config)
        found = checkpoint.restore(starts / run, tree).tree
        state = devices.replicate(checkpoint.from_tree(shapes, found["state"]))
        step, data, _ = tiny.program(config)
        results |= {f"{run}/{k}": v for k, v in first_steps(step, state, found["buffer"], data).items()}
    np.savez(out, **results)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
