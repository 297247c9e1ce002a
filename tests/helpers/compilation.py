"""How tests compile: in a third of the time, by leaving out optimisations whose results are the same but for rounding.

The time of most tests is compilation. `XLA_FLAGS= pytest` compiles everything as users do, in twice the time.
"""

import os
import subprocess
import sys
from importlib.metadata import version

_LEVEL = "--xla_backend_optimization_level=0"
_PLAIN_FUSIONS = "--xla_cpu_use_fusion_emitters=false"
# A program in 32 parts compiles on as many cores, which other tests need, and in a seventh more time in all.
_ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"
_KNOWS_ALL = "0.10.2"
"""jaxlib, of which no test session has to try"""


def choose_flags() -> None:
    """Sets XLA_FLAGS for this process and all that it starts, before JAX starts; flags that are set stay."""
    if "XLA_FLAGS" not in os.environ:
        flags = (_LEVEL, _PLAIN_FUSIONS, _ONE_PART)
        # All at once first, since each try takes a second.
        all_known = version("jaxlib") == _KNOWS_ALL or _are_known(" ".join(flags))
        known = flags if all_known else filter(_are_known, flags)
        os.environ["XLA_FLAGS"] = " ".join(known)


def hlo_of_users() -> dict[str, int | bool]:
    """Compiler options for what looks at the optimised HLO, which LLVM's level does not change."""
    return {name: value for name, value in as_users_do().items() if name != "xla_backend_optimization_level"}


def as_users_do() -> dict[str, int | bool]:
    """Compiler options that undo those flags, for what runs longer than it compiles."""
    undone = {_LEVEL: ("xla_backend_optimization_level", 3), _PLAIN_FUSIONS: ("xla_cpu_use_fusion_emitters", True)}
    return dict(option for flag, option in undone.items() if flag in os.environ["XLA_FLAGS"].split())


def _are_known(flags: str) -> bool:
    """JAX ends a process that is given a flag that its jaxlib does not have."""
    program = "import jax; jax.devices()"
    tried = subprocess.run([sys.executable, "-c", program], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True)
    return tried.returncode == 0
