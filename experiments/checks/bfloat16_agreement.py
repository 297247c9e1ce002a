"""Whether training in bfloat16 agrees with float32 within the spread of seeds.

    python -m experiments.checks.bfloat16_agreement --config=cifar10 --iterations=100

Three seeds of each precision train from the same weights. Compared are the gap of log p~ between data and samples, the
training accuracy and the statistics of the samples. A quantity agrees if the two means differ by no more than the
larger spread over seeds. JAX's default float32 rounds to TF32 in a GPU's convolutions. Writes
experiments/results/bfloat16_agreement.json.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.runs import store
from jem_jax import datasets, replay_buffer
from jem_jax.commands import config_files
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices, processes
from jem_jax.training import divergence, quantities
from jem_jax.training.setup import prepare

DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="cifar10")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store", default="bfloat16_agreement", help="name of the result")
    flags, rest = parser.parse_known_args()
    pairs = [tuple(text.removeprefix("--config.").split("=", 1)) for text in rest]
    config = config_files.read(flags.config, pairs)
    dataset = datasets.load(config.data)
    slots, _ = quantities.buffer_size(config, dataset.num_classes)
    processes.start(processes.Cluster(), devices.choose_cpu_devices((config.training.batch_size, slots)), 1)
    runs = {
        dtype: [_run(_with(config, dtype, seed), dataset, flags.iterations) for seed in range(flags.seeds)]
        for dtype in DTYPES
    }
    names = [name for name in runs["float32"][0] if name != "iteration_seconds"]
    summary = {name: _compared([runs[dtype] for dtype in DTYPES], name) for name in names}
    command = f"python -m experiments.checks.bfloat16_agreement --config={flags.config} --iterations={flags.iterations}"
    store(flags.store, " ".join([command, *rest]), summary, runs)


def _with(config: Config, dtype: str, seed: int) -> Config:
    # The window then holds the last 20 iterations.
    training = dataclasses.replace(config.training, log_every=20)
    return dataclasses.replace(
        config, seed=seed, model=dataclasses.replace(config.model, dtype=dtype), training=training
    )


def _run(config: Config, dataset: Dataset, iterations: int) -> dict[str, float]:
    """What a training has come to; its first weights and chains are those of seed 0."""
    run = prepare(config, dataset)
    data, step = run.data, run.step()
    begin = dataclasses.replace(run, config=dataclasses.replace(config, seed=0)).begin
    state = devices.replicate(begin()[0]._replace(key=jax.random.key(config.seed)))
    slots, classes = quantities.buffer_size(config, dataset.num_classes)
    chains = replay_buffer.init(jax.random.key(1), slots, dataset.image_shape, num_classes=classes)
    start, buffer = jnp.array(chains), devices.shard_buffer(chains)
    state, buffer = jax.block_until_ready(step(state, buffer, data.at(0)))
    started = time.perf_counter()
    for number in range(1, iterations):
        state, buffer = step(state, buffer, data.at(number))
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - started) / (iterations - 1)
    data.close()
    window = jax.device_get(state.window)
    means = {name: float(total) / int(window.steps) for name, total in window.sums.items()}
    ends = devices.whole_buffer(buffer, dataset.image_shape)
    moved = ends[jnp.any(ends != start, axis=tuple(range(1, ends.ndim)))]
    return {
        "loss": means["loss"],
        "accuracy": means["accuracy"],
        "log_px_gap": means["log_px_data"] - means["log_px_samples"],
        "samples_mean": float(moved.mean()),
        "samples_std": float(moved.std()),
        "iteration_seconds": seconds,
        "first_alarm": float(-1 if (alarm := divergence.alarm(state.watch)) is None else alarm.step),
    }


def _compared(runs: Sequence[Sequence[dict[str, float]]], name: str) -> dict[str, Any]:
    values = [[run[name] for run in some] for some in runs]
    means = [statistics.mean(some) for some in values]
    spread = max(max(some) - min(some) for some in values)
    difference = abs(means[1] - means[0])
    found = dict(zip(DTYPES, means, strict=True))
    return {**found, "difference": difference, "spread_of_seeds": spread, "agrees": difference <= spread}


if __name__ == "__main__":
    main()
