"""How tests compile: in a third of the time, by leaving out optimisations whose results are the same but for rounding.

The time of most tests is compilation. `XLA_FLAGS= pytest` compiles everything as users do, in twice the time.
"""

import os
import subprocess
import sys

_LEVEL = "--xla_backend_optimization_level=0"
_PLAIN_FUSIONS = "--xla_cpu_use_fusion_emitters=false"


def choose_flags() -> None:
    """Sets XLA_FLAGS for this process and all that it starts, before JAX starts; flags that are set stay."""
    if "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in (_LEVEL, _PLAIN_FUSIONS) if _is_known(flag))


def as_users_do() -> dict[str, int | bool]:
    """Options of `jax.stages.Lowered.compile` that undo those flags, for what looks at the program itself."""
    undone = {_LEVEL: ("xla_backend_optimization_level", 3), _PLAIN_FUSIONS: ("xla_cpu_use_fusion_emitters", True)}
    return dict(option for flag, option in undone.items() if flag in os.environ["XLA_FLAGS"].split())


def _is_known(flag: str) -> bool:
    """JAX ends a process that is given a flag that its jaxlib does not have."""
    program = "import jax; jax.devices()"
    tried = subprocess.run([sys.executable, "-c", program], env={**os.environ, "XLA_FLAGS": flag}, capture_output=True)
    return tried.returncode == 0
