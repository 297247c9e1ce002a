"""What XLA makes of the training step for an NVIDIA H200, compiled on a machine without a GPU.

    pip install "jax[cuda13]"
    python -m experiments.speed.gpu_program

Compiles the steps of WRN-28-10 and of configs/cifar10_fast.py for a described GPU, with kernels cast once and with a
cast in every step of the chain. Counts what the GPU would launch; nothing runs, so there are no times. Writes
experiments/results/gpu_program.json. Takes about three minutes on two cores.
"""

import os

# Set before JAX looks for a GPU and for its driver.
os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from experiments.runs import store
from experiments.speed.benchmark_cases import Case
from experiments.speed.described import compiled, computations
from jem_jax import config as configuration
from jem_jax.commands import config_files
from jem_jax.config import Config
from jem_jax.training import network

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
"""As XLA describes a GPU to itself"""
KINDS = {
    "convolutions": r"custom_call_target=\"__cudnn\$conv",
    "matrix products": r"kind=kCustom",
    "elementwise": r"kind=kLoop",
    "reductions and changes of layout": r"kind=kInput",
}


def main() -> None:
    large = Case(28, 10, 32, 3, steps=20)
    programs = {
        large.name: configuration.validate(large.settings("bfloat16")),
        "configs/cifar10_fast.py": config_files.read("cifar10_fast", []),
    }
    cast_once = network.Network.cast
    found: list[dict[str, Any]] = []
    for name, config in programs.items():
        for words, cast in (("cast once", cast_once), ("cast in every step", lambda self, variables: variables)):
            network.Network.cast = cast  # type: ignore[method-assign]
            found.append({"case": name, "kernels": words, **_compiled(config)})
            print(found[-1], flush=True)
    store(
        "gpu_program",
        "python -m experiments.speed.gpu_program",
        {"jax": jax.__version__, "programs": found},
        None,
        True,
    )


def _compiled(config: Config) -> dict[str, Any]:
    """Kernels of a chain step and of the rest of an iteration, layouts of convolutions, and memory."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    program = compiled(config, tuple(topology.devices), "gpu")
    text, memory = program.as_text(), program.memory_analysis()
    parts = computations(text)
    entry = parts.pop("ENTRY")
    return {
        "chain_step": _kernels(max(parts.values(), key=lambda part: sum(_kernels(part).values()))),
        "outside": _kernels(entry),
        "layouts": dict(Counter(re.findall(r"dim_labels=([\w>-]+)", text))),
        "temporary_bytes": memory.temp_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
    }


def _kernels(part: str) -> Mapping[str, int]:
    return {kind: len(re.findall(pattern, part)) for kind, pattern in KINDS.items()}


if __name__ == "__main__":
    main()
