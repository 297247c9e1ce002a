"""Runs the main command and notes every program that XLA compiles; one that JAX's cache holds is only read.

    python experiments/speed/watched.py OUT.json --config=configs/digits.py …

A file rather than a module, so that it watches whatever jem_jax the path gives: that of another commit too.
"""

import atexit
import json
import runpy
import sys
import threading
from pathlib import Path

import jax

_COMPILATION = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"


def main() -> None:
    out, sys.argv = Path(sys.argv[1]), ["jem_jax.main", *sys.argv[2:]]
    seconds: list[float] = []
    thread = threading.local()

    def note(name: str, duration: float, **_: object) -> None:
        # Reading from the cache is told first, and counted again as a compilation.
        if name == _COMPILATION and not getattr(thread, "has_read", False):
            seconds.append(duration)
        if name in (_COMPILATION, _READ):
            thread.has_read = name == _READ

    jax.monitoring.register_event_duration_secs_listener(note)
    atexit.register(lambda: out.write_text(json.dumps(seconds)))
    runpy.run_module("jem_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
