"""Ctrl-C, SIGTERM, SIGHUP of a terminal that was closed, and what batch systems send before a time limit.

The first asks a run to save and stop, the second leaves at once.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from jem_jax.distributed import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Slurm sends the one of `--signal`, submitit SIGUSR2, Grid Engine SIGUSR1 and SIGXCPU: each would end a process"""


class Interrupted(Exception):
    """A run stopped because it was told to; all it had is saved.

    Attributes:
      step: iterations done.
      total_steps: of the whole run.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        super().__init__(f"stopped at iteration {step} of {total_steps}")
        self.step, self.total_steps = step, total_steps


class Interrupts:
    """A context in which signals are requests. Afterwards, with several processes, SIGTERM ends this one again."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._when = "after this iteration" if processes.process_count() == 1 else "at the next line of the log"
        # Python hands signals to the main thread alone.
        heeded = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        for number in heeded:
            # Ignored as nohup sets it, so that a run outlives its terminal; or other code of this process has its own.
            if number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) != signal.SIG_DFL:
                continue
            self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # None: not set from Python; JAX's coordination leaves such a handler.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def requested(self, step: int, every: int) -> bool:
        """Whether to save and stop after this iteration; every process gets the same answer.

        Args:
          step: iterations done.
          every: several processes, who have to tell each other, do so after so many iterations.
        """
        if processes.process_count() == 1:
            return self.signal is not None
        if step % every:
            return False
        told = [int(said) for said in processes.gather_strings(str(self.signal or 0)) if said != "0"]
        self.signal = self.signal or next(iter(told), None)
        return bool(told)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            # Straight out: no handler, no thread and no half-written file of ours can hold the program.
            os._exit(128 + number)
        self.signal = number
        with contextlib.suppress(OSError):  # of a terminal that was closed
            os.write(2, f"\nstopping {self._when}; once more leaves at once\n".encode())
