"""The cases and programs of experiments/speed/benchmark.py."""

from dataclasses import asdict, dataclass
from typing import Any

SLOTS = 10_000
MANY_CORES = 8
"""with more than so many, programs are compiled side by side"""


@dataclass(frozen=True)
class Case:
    """A network, its images, and an iteration's sizes."""

    depth: int
    width: int
    side: int
    channels: int
    batch: int = 64
    steps: int = 20
    classes: int = 10

    @property
    def name(self) -> str:
        """In words."""
        return (
            f"WRN-{self.depth}-{self.width} {self.side}×{self.side}×{self.channels}, batch {self.batch}, K {self.steps}"
        )

    @property
    def shape(self) -> dict[str, int]:
        """What a network is built from."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "steps")}

    def settings(self, dtype: str, **overrides: Any) -> dict[str, Any]:
        """Settings of our program; everything else is a default."""
        return {
            "model": {"depth": self.depth, "width": self.width, "dtype": dtype},
            "sampler": {"num_steps": self.steps, "buffer_size": SLOTS},
            "training": {"batch_size": self.batch},
            **overrides,
        }


@dataclass(frozen=True)
class Program:
    """One of the programs that are compared."""

    name: str
    worker: str
    style: str = ""
    dtype: str = "float32"
    tf32: bool = False
    """whether float32 convolutions round to TF32, on GPUs that have it"""
    environment: tuple[tuple[str, str], ...] = ()
    once: bool = False
    """whether it is measured on the first case alone: it takes minutes to compile"""

    @property
    def precision(self) -> str:
        """Of its convolutions."""
        return "tf32" if self.tf32 else self.dtype


_DIGITS, _SMALL, _MIDDLE = (10, 1, 8, 1), (10, 1, 32, 3), (16, 2, 32, 3)
# Freed memory stays with the process: without it glibc gives every large array back and faults it in again. Larger
# thresholds than these overflow in glibc, which then keeps nothing.
_MALLOC = (("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", str(2**31 - 1)))
_ALONE = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)
_OFFICIAL = Program("PyTorch, official style", "torch_worker.py", "official")

CASES = {
    "tiny": [Case(10, 1, 8, 1, batch=8, steps=2)],
    "cpu": [
        *(Case(*_DIGITS, steps=steps) for steps in (20, 10, 5)),
        Case(*_DIGITS, batch=256, steps=10),
        *(Case(*_SMALL, steps=steps) for steps in (20, 5)),
        Case(*_MIDDLE, steps=20),
    ],
    # The paper's first: there may be no time for all.
    "gpu": [
        *(Case(28, 10, 32, 3, steps=steps) for steps in (20, 5)),
        Case(28, 10, 32, 3, batch=256, steps=5),
        Case(28, 10, 32, 3, steps=10),
        Case(*_DIGITS),
        Case(*_SMALL),
        Case(*_MIDDLE),
    ],
}

PROGRAMS = {
    "tiny": [
        Program("jem_jax", "jax_worker.py"),
        _OFFICIAL,
        Program("PyTorch, tuned", "torch_worker.py", "tuned", environment=_MALLOC),
    ],
    "cpu": [
        Program("jem_jax", "jax_worker.py"),
        _OFFICIAL,
        Program("PyTorch, tuned", "torch_worker.py", "tuned", environment=_MALLOC),
        Program("PyTorch, tuned, compiled", "torch_worker.py", "tuned, compiled", environment=_MALLOC, once=True),
    ],
    "gpu": [
        Program("jem_jax bfloat16", "jax_worker.py", dtype="bfloat16", environment=_ALONE),
        Program("PyTorch, official style, TF32 off", "torch_worker.py", "official"),
        Program("PyTorch, official style, PyTorch's defaults", "torch_worker.py", "official", tf32=True),
        Program("PyTorch, tuned, bfloat16", "torch_worker.py", "tuned", dtype="bfloat16"),
        Program("PyTorch, tuned, compiled, bfloat16", "torch_worker.py", "tuned, compiled", "bfloat16", once=True),
    ],
}
