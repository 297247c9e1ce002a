"""What TPU's compiler makes of the training step, on a machine without a TPU.

    pip install "jax[tpu]"
    python -m experiments.speed.tpu_program                      # every program that the results lack: hours
    python -m experiments.speed.tpu_program cifar10@v5e:2x2@10   # one: config, topology, depth
    python -m experiments.speed.tpu_program --preset=tiny        # a network so small that it takes a minute

Compiles the step of a config's last phase in bfloat16 for a described slice, 16 images of p(x) a chip and labelled ones
in proportion. It is the program that a run's `jax.pmap` makes, given the slice's devices; on several hosts a run adds
no more than the hosts' views of the same arrays. Nothing runs, so there are no times: the roof is arithmetic at the
published peak. Writes experiments/results/tpu_program.json as each program ends.
"""

import os

# Set before JAX looks for a TPU.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import argparse
import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend
from jax.experimental import topologies

from experiments import runs
from experiments.speed.described import CLASSES, IMAGE, IMAGES, compiled
from experiments.speed.hlo import Hlo
from jem_jax import convolution
from jem_jax.commands import config_files
from jem_jax.config import Config
from jem_jax.training import forecast, network, schedule

IMAGES_A_CHIP, SLOTS_A_CHIP, LARGE = 16, 160, 2**20

LARGE_TOPOLOGIES = ("v5e:4x4", "v6e:2x4", "v5p:4x4x4")
CONFIGS = ("cifar10", "cifar10_ten_minutes", "cifar10_sada")
CASES = (
    "cifar10@v5e:2x2@10",
    *(f"{config}@{topology}@10" for topology in LARGE_TOPOLOGIES for config in CONFIGS),
    *(f"{config}@v5e:2x2" for config in CONFIGS),
    "cifar10@v5p:4x4x4",
)
"""Config, topology, and depth where it is not the config's own; the cheap ones first"""


class Chip(NamedTuple):
    """Published figures of a chip (Google Cloud TPU documentation, pages v5e, v5p and v6e)."""

    flops: float
    """of bfloat16, a second"""
    bandwidth: float
    """of its memory, bytes/s"""
    links: float
    """between chips, bytes/s in one direction, all links together: half of what is published for both"""
    lanes: int
    """side of its matrix units"""
    pod: int
    """chips of the largest slice"""


CHIPS = {
    "v5e": Chip(197e12, 819e9, 400e9 / 2, 128, 256),
    "v5p": Chip(459e12, 2765e9, 1200e9 / 2, 128, 6144),
    "v6e": Chip(918e12, 1640e9, 800e9 / 2, 256, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", help="CONFIG@TOPOLOGY or CONFIG@TOPOLOGY@DEPTH")
    parser.add_argument("--preset", choices=("tiny", "all"), default="all")
    given = parser.parse_args()
    if given.preset == "tiny":
        print(json.dumps(tiny(), indent=1))
        return
    found = _stored()
    for case in given.case or [case for case in CASES if case not in found]:
        config, topology, *depth = case.split("@")
        found[case] = measured(pod_config(config, topology, *map(int, depth)), topology)
        runs.store(
            "tpu_program",
            "python -m experiments.speed.tpu_program",
            {
                "jax": jax.__version__,
                "libtpu": importlib.metadata.version("libtpu"),
                "programs": found,
                "not_compiled": [case for case in CASES if case not in found],
            },
            None,
            quiet=True,
        )
        print(case, json.dumps(found[case]), flush=True)


def tiny() -> dict[str, Any]:
    """A WRN-10-1 with batch norm for four chips."""
    settings = ("model.width", 1), ("model.norm", "batch"), ("sampler.num_steps", 3), ("sampler.buffer_size", 4096)
    config = pod_config("cifar10", "v5e:2x2", 10, [(name, str(value)) for name, value in settings])
    return measured(config, "v5e:2x2")


def pod_config(name: str, topology: str, depth: int | None = None, more: Any = ()) -> Config:
    """Settings of a config file for a slice: 16 images of p(x) a chip, at least 160 slots a chip, bfloat16."""
    config, chips = config_files.read(name), len(_chips(topology))
    labelled = config.training.labelled_batch_size * IMAGES_A_CHIP * chips // config.training.batch_size
    settings = {
        "model.dtype": "bfloat16",
        "model.depth": depth or config.model.depth,
        "training.batch_size": IMAGES_A_CHIP * chips,
        "training.labelled_batch_size": labelled,
        "sampler.buffer_size": max(config.sampler.buffer_size // chips, SLOTS_A_CHIP) * chips,
    }
    return config_files.read(name, [*((key, str(value)) for key, value in settings.items()), *more])


def measured(config: Config, topology: str) -> dict[str, Any]:
    """What one program takes, moves, exchanges and computes, on each chip."""
    started, chips = time.monotonic(), _chips(topology)
    program = compiled(config, chips, "tpu")
    memory, chip = program.memory_analysis(), CHIPS[topology.partition(":")[0]]
    phase = schedule.phases(config, 10**9)[-1].program
    hlo = Hlo(program.as_text(), phase.num_steps)
    flops = _algorithm(config, phase) / len(chips)
    traffic = hlo.traffic("ENTRY") + hlo.turns * hlo.traffic(hlo.loop)
    slots = config.sampler.buffer_size // len(chips)
    return {
        "chips": len(chips),
        "batch_a_chip": [size // len(chips) for size in config.training.batch_sizes],
        "slots_a_chip": slots,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "collectives": hlo.collectives(),
        "chain_copies": hlo.copies(hlo.loop, LARGE),
        "chain_transposes": hlo.transposes(hlo.loop),
        "buffer_copies": hlo.rewrites("f32", slots * math.prod(IMAGE)) - 1,
        "image_copies": hlo.rewrites("u8", IMAGES * math.prod(IMAGE)),
        "host_transfers": hlo.host_transfers(),
        "convolutions": hlo.convolution_types(),
        "chain_steps": hlo.turns,
        "lanes_filled": lanes_filled(config, chip.lanes),
        "memory_padding": hlo.padding(hlo.loop),
        "flops": flops,
        "traffic_bytes": traffic,
        "link_bytes_per_second": chip.links,
        "pod_chips": chip.pod,
        "roof_ms": {"arithmetic": 1e3 * flops / chip.flops, "memory": 1e3 * traffic / chip.bandwidth},
        "compile_seconds": round(time.monotonic() - started),
    }


def lanes_filled(config: Config, lanes: int) -> float:
    """A model: arithmetic as a share of what it is with channels in and out filled up to the matrix unit's side.

    Forward passes and both kinds of gradients multiply by the same channels, so that one forward pass stands for all.
    """
    net, variables, x = _network(config)
    with convolution.plain():
        products = list(_products(jax.make_jaxpr(net.logits)(variables, x).jaxpr))
    full = lambda size: -(-size // lanes) * lanes  # noqa: E731
    padded = sum(work / taken / given * full(taken) * full(given) for work, taken, given in products)
    return round(sum(work for work, *_ in products) / padded, 3)


def _products(jaxpr: Any) -> Iterator[tuple[float, int, int]]:
    """Every convolution and matrix product: its multiplications, and its channels in and out."""
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _products(inner)
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            # Kernels are [3, 3, C, D] and [C, D].
            kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            yield math.prod(kernel) / kernel[-1] * math.prod(result), *kernel[-2:]


def _network(config: Config) -> tuple[network.Network, Any, Any]:
    """The network, and the shapes of its variables and of an image."""
    net = network.build(config.model, CLASSES)
    key, x = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((1, *IMAGE), "float32")
    return net, jax.eval_shape(net.init, key, x), x


def _algorithm(config: Config, program: schedule.Program) -> float:
    """Arithmetic of an iteration on all chips, as a run forecasts it."""
    net, variables, _ = _network(config)
    return forecast.flops_per_iteration(config, net, variables, IMAGE, program)


@functools.cache
def _chips(topology: str) -> tuple[jax.Device, ...]:
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def _stored() -> dict[str, Any]:
    path = runs.RESULTS / "tpu_program.json"
    return json.loads(path.read_text())["summary"]["programs"] if path.exists() else {}


if __name__ == "__main__":
    main()
