"""Several processes: starting, joining, waiting for each other, failing together. No other file knows of several."""

import atexit
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jem_jax.common.errors import UserError, first_line
from jem_jax.distributed import devices, rendezvous

_START_SECONDS = 120
_SILENT_SECONDS = 100
"""seconds without a sign of life of a process, after which JAX ends all others"""
_FAREWELL_SECONDS = 2
_TEXT_BYTES = 1000
_SETTINGS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_transfer_guard": "allow",
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
    "jax_debug_key_reuse": False,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_array_garbage_collection_guard": "allow",
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
}
"""settings of JAX that a run's numbers and checkpoints depend on; the environment and other code may differ"""
_LAST_SECONDS = 24 * 3600
"""seconds that finished processes wait for the first one, which evaluates and draws"""


@dataclass(frozen=True)
class Cluster:
    """The addresses of the other processes. By default there are none."""

    coordinator_address: str | None = None
    """host:port of process 0"""
    num_processes: int | None = None
    process_id: int | None = None
    automatic: bool = False
    """JAX finds the others: Cloud TPU, Slurm, Kubernetes"""


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Sets JAX up as this package needs it, and restores its settings afterwards for other code of this process."""
    # Versions of JAX differ in what they have. A new thread is in none of the caller's contexts.
    with ThreadPoolExecutor(1) as thread:
        values = thread.submit(lambda: jax.config.values).result()
    before = {name: values[name] for name in _SETTINGS if name in values}
    with contextlib.ExitStack() as contexts:
        try:
            for name in before:
                jax.config.update(name, _SETTINGS[name])
                # In a `with jax.enable_x64():` of the caller's, that counts more in this thread.
                if hasattr(jax, context := name.removeprefix("jax_")):
                    contexts.enter_context(getattr(jax, context)(_SETTINGS[name]))
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            devices.use(None)


def start(cluster: Cluster, cpu_devices: int, require_devices: int) -> None:
    """Starts JAX within `own_settings`. If other code of this process has started it before, its devices stay.

    Args:
      cluster: the other processes, if any. Either all start or none does.
      cpu_devices: devices to make of a CPU; the environment's JAX_NUM_CPU_DEVICES and XLA_FLAGS take precedence.
      require_devices: the fewest devices of all processes together.

    Raises:
      UserError: the other processes cannot be reached, the platform that was asked for is not there, or there are
        too few devices.
    """
    _use_compilation_cache()
    # A CPU runs one program at a time.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if devices.set_by_environment():
        count = int(os.environ.get("JAX_NUM_CPU_DEVICES", 1))  # JAX itself has read it as an integer
        if count < 1:
            raise UserError(f"JAX_NUM_CPU_DEVICES must be at least 1, not {count}")
    else:
        # JAX raises this if other code has started it.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cpu_devices)
    _join(cluster)
    try:
        total = jax.device_count()
    except (RuntimeError, AssertionError) as error:  # an assertion where no JAX of that platform is installed
        raise UserError(
            f"no device of platform {os.environ.get('JAX_PLATFORMS')!r} (JAX_PLATFORMS) could be started "
            f"({first_line(error)}); install JAX for it (the extras cuda12, cuda13 and tpu), or set JAX_PLATFORMS=cpu"
        ) from error
    if devices.cpu_devices() and not devices.set_by_environment() and jax.process_count() == 1:
        # The most that divide `cpu_devices`, for which the sizes were chosen.
        total = next(number for number in range(total, 0, -1) if cpu_devices % number == 0)
        devices.use(total)
    if total < require_devices:
        raise UserError(f"--require_devices={require_devices}, but there are {devices.describe()}")


def _join(cluster: Cluster) -> None:
    explicit = (cluster.coordinator_address, cluster.num_processes, cluster.process_id)
    if not cluster.automatic and all(value is None for value in explicit):
        return
    address, number, process = explicit
    if not cluster.automatic or any(value is not None for value in explicit):
        if address is None or number is None or process is None:
            raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three")
        if number < 1:
            raise UserError(f"--num_processes must be at least 1, not {number}")
        if not 0 <= process < number:
            raise UserError(f"--process_id must be from 0 to {number - 1}, not {process}")
        rendezvous.meet(address, number, process, _START_SECONDS)
    # `interrupts` handles SIGTERM, and tells the other processes of it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_SILENT_SECONDS,
            shutdown_timeout_seconds=_LAST_SECONDS,
        )
    except Exception as error:
        whom = "those of --coordinator_address" if address else "--distributed: no TPU pod, Slurm or Kubernetes found"
        raise UserError(f"the other processes could not be reached ({whom}): {first_line(error)}") from error


def _use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, in the environment's folder or this user's, if it is writable."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given == "" or "://" in (given or ""):  # no cache, or JAX reaches it by other packages
        return
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # Its standard has relative ones ignored.
    own = Path(cache if os.path.isabs(cache) else "~/.cache") / "jem_jax" / "xla"
    try:
        folder = Path(given or own).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        is_usable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # a read-only home, or none at all
        is_usable = False
    if is_usable or given:
        # JAX would warn of a folder of the environment's that cannot be written, at each program.
        jax.config.update("jax_compilation_cache_dir", str(folder) if is_usable else None)
    if is_usable and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def process_count() -> int:
    """Processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes metrics, pictures and reports."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """A barrier: returns once all processes have called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raises an error of one process on all of them, so that none waits for one that is gone.

    Raises:
      UserError: of this process, or of the first that has one.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    failed = next((said for said in gather_strings(str(own or "")) if said), None)
    if own is not None:
        raise own
    if failed is not None:
        raise UserError(failed)


def gather_strings(text: str) -> list[str]:
    """The texts of all processes in their order, each cut after 1,000 bytes."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    own = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode(errors="backslashreplace")[:_TEXT_BYTES], np.uint8)
    own[: len(encoded)] = encoded
    every = np.asarray(multihost_utils.process_allgather(own))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in every]


def explain_runtime_error(error: BaseException) -> str | None:
    """An explanation of an error of JAX's runtime: no memory left, or a process that is gone. None for other errors."""
    # jaxlib gives its status codes as errors of several kinds, some of them ValueError.
    code = None if isinstance(error, UserError) else re.match(r"([A-Z_]{5,}): ", str(error))
    if isinstance(error, MemoryError) or (code and code[1] == "RESOURCE_EXHAUSTED"):
        return (
            f"the memory did not suffice ({first_line(error)[:200]}); lower config.training.batch_size or "
            "config.model.width in training, config.evaluation.batch_size in an evaluation. The same command goes on "
            "from the last checkpoint"
        )
    if jax.process_count() > 1 and (code or isinstance(error, jax.errors.JaxRuntimeError)):
        return (
            f"the run broke off, since another process ended or could not be reached ({first_line(error)[:200]}); its "
            "output says why. The same command on all goes on from the last checkpoint"
        )
    return None


def exit_without_barrier() -> None:
    """Exits without JAX's shutdown barrier, which would deadlock: the other processes wait for this one."""
    if jax.process_count() > 1:
        atexit.register(_leave)


def _leave() -> None:
    if is_first():
        # JAX ends the others with this process. Those that fail too first get time to print why.
        time.sleep(_FAREWELL_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
