"""The test process: four virtual CPU devices, and one compilation cache for all tests of a session."""

import gc
import os
import signal
import tempfile

import compilation

# Before JAX starts; programs that tests start inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# The processes that pytest-xdist starts share that of the first.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jem_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    compilation.choose_flags()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.0"

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
import tiny

from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices

# A shell starts programs in its background with Ctrl-C ignored, and those that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What was imported stays; looking through it again and again takes a tenth of the time of tracing.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def tiny_dataset() -> Dataset:
    """43 training, 12 validation and 12 test images [8, 8, 1] of three classes that are easy to tell apart."""
    return tiny.dataset()


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """A function of overrides that gives settings of a tiny run: `tiny_config(**{"training.batch_size": 16})`."""
    return tiny.config


@pytest.fixture
def use_devices() -> Iterator[Callable[[int], None]]:
    """A function that makes this process use so many of its four devices; afterwards it uses all of them."""
    yield devices.use
    devices.use(None)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed() -> Iterator[None]:
    """Every compiled program holds memory maps, of which a process may have 65,530: all tests together pass that,
    and the compiler then dies of it. A module makes 3,000 of them at most, and small programs serve several modules."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()
        gc.collect()


_LONGEST = (
    "processes", "train_step", "report", "train", "fuzz_config", "torch_import", "main", "signals", "recovery", "disk",
    "import_official", "packaging", "bad_input", "memory",
)  # fmt: skip
"""The files that take longest come first, so that no core is left waiting for another's last one"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in that order, the others behind them."""
    places = {f"test_{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where PyTorch was installed for its tests, one that is skipped has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("torch") and os.environ.get("JEM_JAX_REQUIRE_TORCH"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, although JEM_JAX_REQUIRE_TORCH is set"
    return report
