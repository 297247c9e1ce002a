"""Runs the main command and notes every program that XLA compiles.

    python experiments/speed/watched.py OUT.json --config=configs/digits.py …

A file rather than a module, so that it watches whatever jem_jax the path gives: that of another commit too.
"""

import atexit
import json
import runpy
import sys
from pathlib import Path

import jax

_COMPILATION = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    out, sys.argv = Path(sys.argv[1]), ["jem_jax.main", *sys.argv[2:]]
    seconds: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: seconds.append(duration) if name == _COMPILATION else None
    )
    atexit.register(lambda: out.write_text(json.dumps(seconds)))
    runpy.run_module("jem_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
