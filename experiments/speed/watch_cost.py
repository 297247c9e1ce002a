"""What watching for divergence costs: the digits iteration with and without it, in turns in one process.

    python -m experiments.speed.watch_cost

Without the watch, the step takes no moments of the images, looks for no numbers that are not finite, and counts no
faults. All else is the same program. Writes experiments/results/watch_cost.json.
"""

import os
import runpy
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.runs import ROOT, store
from jem_jax import config as configuration
from jem_jax import datasets
from jem_jax.distributed import devices, processes
from jem_jax.training import divergence, quantities
from jem_jax.training.setup import prepare

ROUNDS, ITERATIONS = 5, 50
UNWATCHED = {
    "moments": lambda *_: None,
    "finite": lambda _: jnp.array(True),
    "health": lambda *_: divergence.Health(jnp.float32(0), jnp.float32(0), None),
    "watched": lambda watch, *_: watch,
}


def main() -> None:
    processes.start(processes.Cluster(), 1, 1)
    loose = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    config = configuration.validate(loose)
    runs = {"with": _Run(config)}
    with mock.patch.multiple(divergence, **UNWATCHED):
        runs["without"] = _Run(config)
    rounds = [{name: run.seconds() for name, run in runs.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(entry[name] for entry in rounds) for name in runs}
    summary = {
        "milliseconds": {name: round(1000 * value, 3) for name, value in medians.items()},
        "ratio": round(medians["with"] / medians["without"], 4),
        "ratio_of_rounds": [round(entry["with"] / entry["without"], 4) for entry in rounds],
        "load_average": round(os.getloadavg()[0], 2),
    }
    store("watch_cost", "python -m experiments.speed.watch_cost", summary, rounds)


class _Run:
    """A run's first iterations, compiled where it is made."""

    def __init__(self, config: configuration.Config) -> None:
        dataset = datasets.load(config.data)
        run = prepare(config, dataset)
        self._data, self._step = run.data, run.step()
        key = jax.random.key(config.seed)
        state, _ = run.begin()
        slots, classes = quantities.buffer_size(config, dataset.num_classes)
        chains = jax.random.uniform(key, (slots, classes, *dataset.image_shape), minval=-1, maxval=1)
        self._now: Any = (devices.replicate(state), devices.shard_buffer(chains))
        self._number = 0
        self._iterate()

    def seconds(self) -> float:
        """An iteration's, over `ITERATIONS`."""
        started = time.perf_counter()
        for _ in range(ITERATIONS):
            self._iterate()
        jax.block_until_ready(self._now)
        return (time.perf_counter() - started) / ITERATIONS

    def _iterate(self) -> None:
        self._now = self._step(*self._now, self._data.at(self._number))
        self._number += 1
        if self._number == 1:
            jax.block_until_ready(self._now)


if __name__ == "__main__":
    main()
