"""Devices: what lies on each, and how a step runs on all of them. The only file that knows there are several.

A step is written for one device and mapped by `jax.pmap` over all devices of all processes. What every device holds
alike (parameters, optimiser state, images) is a plain pytree mapped with axis None; what is cut (the replay buffer)
carries a leading axis of this process's devices. Devices meet in one `mean` of the step.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
T = TypeVar("T")

AXIS = "devices"
_LANES = 128
"""elements of a row of a TPU's memory"""

_used: int | None = None
"""how many of a CPU's devices are used, where JAX had more before this program chose; None: all"""


def use(count: int | None) -> None:
    """Uses so many of this process's devices from now on; None: all of them."""
    global _used
    _used = count


def _local() -> list[jax.Device]:
    return jax.local_devices()[:_used]


def choose_cpu_devices(sizes: Sequence[int], num_processes: int = 1) -> int:
    """The largest of 4, 2, 1 that the usable cores allow and that divides all sizes (0 divides by anything)."""
    cores = _usable_cores()
    fitting = (n for n in (4, 2) if n <= cores and all(size % (n * num_processes) == 0 for size in sizes))
    return next(fitting, 1)


def cpu_devices() -> int:
    """How many devices the CPU was made into; 0 on an accelerator."""
    return local_count() if jax.default_backend() == "cpu" else 0


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def set_by_environment() -> bool:
    """Whether the environment says how many devices a CPU is to be."""
    return "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )


def count() -> int:
    """Devices of all processes."""
    return jax.device_count() if _used is None else _used


def local_count() -> int:
    """Devices of this process."""
    return len(_local())


def describe() -> str:
    """The devices in words: "2 CPU devices", "8 × NVIDIA H100 in 2 processes"."""
    device, total = jax.devices()[0], count()
    if device.platform == "cpu":
        text = f"{total} CPU device{'s' if total > 1 else ''}"
    else:
        text = f"{total} × {device.device_kind}"
    return text + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")


def index() -> Array:
    """Inside a mapped step: this device's number among all."""
    return jax.lax.axis_index(AXIS)


def mean(tree: T) -> T:
    """Inside a mapped step: the mean over all devices of a pytree's floats, as one all-reduce.

    Of integers, such as counts, which a mean would turn into floats, the largest; that takes another all-reduce.
    """
    leaves, structure = jax.tree.flatten(tree)
    floats = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in leaves]
    means = iter(jax.lax.pmean([leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float], AXIS))
    others = iter(jax.lax.pmax([leaf for leaf, is_float in zip(leaves, floats, strict=True) if not is_float], AXIS))
    return jax.tree.unflatten(structure, [next(means if is_float else others) for is_float in floats])


def per_device(
    step: Callable[..., Any], *, in_axes: Any, out_axes: Any, donate_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`step` on every device of every process; an axis is None (alike everywhere) or 0 (cut by device)."""
    places = shard(np.arange(count(), dtype=np.int32))
    mapped = mapped_over(None if _used is None else _local(), step, in_axes, out_axes, donate_argnums)
    if not cpu_devices():
        return functools.partial(mapped, places)

    def one_at_a_time(*args: Any) -> Any:
        # A CPU has one program at a time. With iterations queued on several of its devices, their threads can wait for
        # each other in the all-reduce until XLA aborts the process (jaxlib 0.10.2: within seconds at 500 a second, even
        # without asynchronous dispatch).
        return jax.block_until_ready(mapped(*args))

    one_at_a_time.lower = mapped.lower  # type: ignore[attr-defined]
    return functools.partial(one_at_a_time, places)


def mapped_over(
    chips: Sequence[jax.Device] | None, step: Callable[..., Any], in_axes: Any, out_axes: Any, donate: tuple[int, ...]
) -> Any:
    """`jax.pmap` of a step over these devices, or all; before its own arguments it takes one that is cut.

    pmap wants at least one such argument, and a plain classifier has none.
    """
    return jax.pmap(
        lambda _, *args: step(*args),
        axis_name=AXIS,
        in_axes=(0, *in_axes),
        out_axes=out_axes,
        donate_argnums=tuple(number + 1 for number in donate),
        devices=chips,
    )


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of what runs once: a CPU's compiler then optimises nothing, which takes a tenth of the time."""
    options = _on_cpu(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=False)
    return jax.jit(function, compiler_options=options)


def _on_cpu(**options: Any) -> dict[str, Any]:
    """Compiler options for a CPU, but for those that XLA_FLAGS sets or this XLA does not know; none elsewhere."""
    if jax.default_backend() != "cpu":
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags and _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Traced:
    """A step of `per_device` traced for arguments of some shapes."""

    returns: Any
    """the shapes of what it returns"""
    compile: Callable[[], Callable[..., Any]]
    """-> the step, for arguments of these shapes alone"""


def traced(step: Callable[..., Any], *args: Any) -> Traced:
    """Traces a step of `per_device`, once for its check and its compilation.

    With several processes it is compiled at its first call: ahead, pmap takes global arrays only.
    """
    if jax.process_count() > 1:
        return Traced(jax.eval_shape(step, *args), lambda: step)
    assert isinstance(step, functools.partial)
    mapped: Any = step.func
    lowered = mapped.lower(*step.args, *args)

    def compiled() -> Callable[..., Any]:
        # LLVM's higher levels compile longer and gain a step little: its time goes into XLA's own kernels.
        program = lowered.compile(_on_cpu(xla_backend_optimization_level=1))
        if cpu_devices() < 2:
            return functools.partial(program, *step.args)
        return lambda *own: jax.block_until_ready(program(*step.args, *own))

    return Traced(lowered.out_info, compiled)


def replicate(tree: Any) -> Any:
    """The pytree on every device of this process, put there once so that no step has to."""
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def shard(array: np.ndarray | Array) -> Array:
    """This process's part of a whole array [N, ...], cut by device: [local devices, N / devices, ...]."""
    parts = array.reshape(count(), -1, *array.shape[1:])
    local = parts[jax.process_index() * local_count() :][: local_count()]
    return jax.device_put(local, NamedSharding(_mesh(), PartitionSpec(AXIS)))


def shard_each(values: np.ndarray) -> Array:
    """One value for each device [devices], as this process's part [local devices]."""
    return shard(values)[:, 0]


def shard_buffer(buffer: np.ndarray | Array) -> Array:
    """A whole replay buffer [S, C, H, W, channels] as a step takes it: [local devices, S / devices, *flat]."""
    if isinstance(buffer, Array) and not buffer.is_fully_addressable:
        from jax.experimental import multihost_utils

        own = multihost_utils.global_array_to_host_local_array(buffer, _mesh_of_all(), PartitionSpec(AXIS))
        shape = (local_count(), -1, *flat(buffer.shape[1:]))
        return jax.jit(lambda own: own.reshape(shape), out_shardings=NamedSharding(_mesh(), PartitionSpec(AXIS)))(own)
    if jax.default_backend() == "cpu":
        # It lies on the host there, where NumPy gives it another shape without a program to compile.
        buffer = np.asarray(buffer)
    return shard(buffer.reshape(len(buffer), *flat(buffer.shape[1:])))


def rows_of(whole: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape that `shard_buffer` gives a whole buffer of this shape."""
    return jax.ShapeDtypeStruct((local_count(), len(whole) // count(), *flat(whole.shape[1:])), whole.dtype)


def spread(whole: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A whole array's shape [N, ...], cut over the devices of several processes, so that each reads its own part."""
    if jax.process_count() == 1:
        return whole
    return jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=NamedSharding(_mesh_of_all(), PartitionSpec(AXIS)))


def flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an image, or of all classes' images of a slot, where arrays of many lie on devices.

    XLA lays images of three axes out one way where they are kept and another where some are gathered or written, and
    copies all of them in every iteration: on a CPU where an axis has one element, on a TPU always, with rows filled up
    to its 128 lanes (libtpu 0.0.42). Whole rows of lanes lie alike everywhere.
    """
    size = math.prod(shape)
    return (size,) if size % _LANES else (size // _LANES, _LANES)


def whole_buffer(rows: Array, image_shape: tuple[int, ...]) -> Array:
    """The inverse of `shard_buffer`."""
    return whole(rows, (-1, *image_shape))


def shard_rows(array: np.ndarray, rows: np.ndarray) -> Array:
    """`shard(array[rows])`, of which this process gathers its own part alone: [local devices, rows / devices, ...]."""
    parts = rows.reshape(count(), -1)
    local = array[parts[jax.process_index() * local_count() :][: local_count()]]
    return jax.device_put(local, NamedSharding(_mesh(), PartitionSpec(AXIS)))


def memory_for_data() -> int:
    """Bytes of a data set that a device may hold whole: a tenth of its memory; 1 GiB on a CPU."""
    limit = device_memory()
    return 2**30 if limit is None else limit // 10


def device_memory() -> int | None:
    """Bytes that a device has for itself; None on a CPU, and where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def whole(array: Array, entry: tuple[int, ...] | None = None) -> Array:
    """The inverse of `shard`, as a new array: [N, ...], spread over the devices of all processes.

    Args:
      entry: the shape of each of the N, where it is to be another than in the parts.
    """
    entry = array.shape[2:] if entry is None else entry
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        cut, mesh = PartitionSpec(AXIS), _mesh_of_all()
        array = multihost_utils.host_local_array_to_global_array(array, mesh, cut)
        return jax.jit(_merge, static_argnames="entry", out_shardings=NamedSharding(mesh, cut))(array, entry=entry)
    return jax.jit(_merge, static_argnames="entry")(array, entry=entry)


def _merge(array: Array, entry: tuple[int, ...]) -> Array:
    return array.reshape(array.shape[0] * array.shape[1], *entry)


def over_examples(function: Callable[[Any, Any], Any], *, together: bool = False) -> Callable[..., Any]:
    """`function` over a long axis of examples, cut into batches and over this process's devices.

    Args:
      function: (shared pytree, pytree of [b, ...]) -> pytree of [b, ...], each example on its own.
      together: the examples of a batch influence each other instead, as by batch statistics. Every device then takes
        whole batches, each of examples from anywhere among the N. Results depend on N and `batch_size`, not on the
        devices.

    Returns:
      (shared, examples, batch_size, fill=0) -> pytree of NumPy arrays [N, ...]; `examples` is a pytree of arrays
      [N, ...], `shared` what every batch needs alike (variables, a key). The last batch is filled up with the first
      examples, so that one program serves all; fewer than `fill` examples are filled up to so many, so that the same
      program serves them too.
    """
    devices = _local()
    # pmap cuts nothing where an argument of axis None has no leaves (JAX 0.10.2): with this zero it has one.
    mapped: Any = jax.pmap(
        lambda shared, examples: function(shared[0], examples), axis_name=AXIS, in_axes=(None, 0), devices=devices
    )
    # A report's programs run for seconds: on a CPU a shorter compilation outweighs a few percent of their time.
    options = _on_cpu(xla_backend_optimization_level=1, xla_cpu_use_fusion_emitters=False)
    programs: dict[Any, Callable[..., Any]] = {}

    def program(*args: Any) -> Callable[..., Any]:
        leaves, structure = jax.tree.flatten(jax.tree.map(jax.typeof, args))
        key = (structure, *leaves)
        if options and key not in programs:
            programs[key] = mapped.lower(*args).compile(options)
        return programs.get(key, mapped)

    def run(shared: Any, examples: Any, batch_size: int, fill: int = 0) -> Any:
        total = len(jax.tree.leaves(examples)[0])
        batch_size = min(batch_size, max(total, fill))
        share = batch_size if together else -(-batch_size // len(devices))
        size = share * len(devices)
        # Neighbours are often alike, such as examples in the order of their classes.
        order = np.random.default_rng(0).permutation(total) if together else np.arange(total)
        shared, examples = replicate((shared, np.int32(0))), jax.tree.map(np.asarray, examples)
        results = []
        for start in range(0, total, size):
            rows = order[np.arange(start, start + size) % total]
            batch = jax.tree.map(lambda leaf, rows=rows: _cut(leaf[rows], len(devices)), examples)
            result = jax.device_get(program(shared, batch)(shared, batch))
            results.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result))
        back = np.argsort(order)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *results)

    return run


def _cut(array: np.ndarray, parts: int) -> np.ndarray:
    return array.reshape(parts, -1, *array.shape[1:])


def _mesh_of_all() -> Mesh:
    """The devices of all processes in pmap's order, process by process; a TPU host's are not numbered in a row."""
    ordered = [device for process in range(jax.process_count()) for device in jax.local_devices(process_index=process)]
    return Mesh(np.array(ordered), (AXIS,))


def _mesh() -> Mesh:
    return Mesh(np.array(_local()), (AXIS,))
