"""Devices and processes: the only file that knows there are several.

A step is written for one device and mapped by `jax.pmap` over all devices of all processes. What every device holds
alike (parameters, optimiser state, images) is a plain pytree mapped with axis None; what is cut (the replay buffer)
carries a leading axis of this process's devices. Devices meet in one `mean` of the step.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
T = TypeVar("T")

AXIS = "devices"


def count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def process_count() -> int:
    """Processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes metrics, pictures and reports."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Holds every process until all have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def describe() -> str:
    """The devices in words: "2 CPU devices", "8 × NVIDIA H100 in 2 processes"."""
    device, total = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        text = f"{total} CPU device{'s' if total > 1 else ''}"
    else:
        text = f"{total} × {device.device_kind}"
    return text + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")


def index() -> Array:
    """Inside a mapped step: this device's number among all."""
    return jax.lax.axis_index(AXIS)


def mean(tree: T) -> T:
    """Inside a mapped step: the mean over all devices of a pytree of floats, as one all-reduce."""
    return jax.lax.pmean(tree, AXIS)


def per_device(
    step: Callable[..., Any], *, in_axes: Any, out_axes: Any, donate_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`step` on every device of every process; an axis is None (alike everywhere) or 0 (cut by device)."""
    return jax.pmap(step, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate_argnums)


def replicate(tree: T) -> T:
    """The pytree on every device of this process, put there once so that no step has to."""
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def shard(array: np.ndarray | Array) -> Array:
    """This process's part of a whole array [N, ...], cut by device: [local devices, N / devices, ...]."""
    parts = array.reshape(jax.device_count(), -1, *array.shape[1:])
    first = jax.process_index() * jax.local_device_count()
    local = parts[first : first + jax.local_device_count()]
    return jax.device_put(local, NamedSharding(_mesh(), PartitionSpec(AXIS)))


def whole(array: Array) -> Array:
    """The inverse of `shard`, as a new array: [N, ...], spread over the devices of all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        spread = PartitionSpec(AXIS)
        mesh = Mesh(np.array(jax.devices()), (AXIS,))
        array = multihost_utils.host_local_array_to_global_array(array, mesh, spread)
        return jax.jit(_merge, out_shardings=NamedSharding(mesh, spread))(array)
    return jax.jit(_merge)(array)


def gather(array: Array) -> np.ndarray:
    """The inverse of `shard`, as a host array [N, ...] on every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(whole(array), tiled=True))
    return np.asarray(whole(array))


def _merge(array: Array) -> Array:
    return array.reshape(-1, *array.shape[2:])


def over_examples(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any, int], Any]:
    """`function` over a long axis of examples, cut into batches and over this process's devices.

    Args:
      function: (shared pytree, pytree of [b, ...]) -> pytree of [b, ...], each example on its own.

    Returns:
      (shared, examples, batch_size) -> pytree of NumPy arrays [N, ...]; `examples` is a pytree of NumPy arrays
      [N, ...], `shared` what every batch needs alike (variables). The last batch is filled up, so that one
      program, compiled once, serves all.
    """
    devices = jax.local_devices()
    mapped = jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=devices)

    def run(shared: Any, examples: Any, batch_size: int) -> Any:
        total = len(jax.tree.leaves(examples)[0])
        size = -(-min(batch_size, total) // len(devices)) * len(devices)
        shared = replicate(shared)
        results = []
        for start in range(0, total, size):
            rows = np.minimum(np.arange(start, start + size), total - 1)
            batch = jax.tree.map(lambda leaf, rows=rows: _cut(np.asarray(leaf)[rows], len(devices)), examples)
            result = jax.device_get(mapped(shared, batch))
            results.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *results)

    return run


def _cut(array: np.ndarray, parts: int) -> np.ndarray:
    return array.reshape(parts, -1, *array.shape[1:])


def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), (AXIS,))
