"""Ctrl-C, SIGTERM, SIGHUP from a closed terminal, and the signals of batch systems before a time limit.

The first signal asks a run to save and stop, the second ends it at once.
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
    """A run stopped after a signal, with everything saved.

    Attributes:
      step: iterations done.
      total_steps: of the whole run.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        super().__init__(f"stopped at iteration {step} of {total_steps}")
        self.step, self.total_steps = step, total_steps


class Interrupts:
    """A context in which a signal is a request to stop. Afterwards SIGTERM ends the process again."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._when = "after this iteration" if processes.process_count() == 1 else "at the next line of the log"
        # Python allows handlers in the main thread alone.
        handled = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        for number in handled:
            # nohup ignores SIGHUP, so that a run outlives its terminal. Other code of this process may have handlers.
            if number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) != signal.SIG_DFL:
                continue
            self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not set from Python, such as JAX's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def requested(self, step: int, every: int) -> bool:
        """Whether to save and stop after this iteration; every process gets the same answer.

        Args:
          step: iterations done.
          every: several processes exchange their signals after so many iterations.
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
            # No handler, thread or half-written file can delay this.
            os._exit(128 + number)
        self.signal = number
        with contextlib.suppress(OSError):  # of a terminal that was closed
            os.write(2, f"\nstopping {self._when}; once more leaves at once\n".encode())
