"""Ctrl-C and SIGTERM: the first asks a run to save and stop, the second leaves at once."""

import os
import signal
from types import FrameType
from typing import Any, Protocol

from jem_jax import parallel


class Preemptible(Protocol):
    """What knows whether all processes are to stop at a step."""

    def reached_preemption(self, step: int) -> bool:
        """Whether to stop, the same on every process."""
        ...


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
    """A context in which signals are requests.

    With several processes SIGTERM is left to JAX's coordination service, which lets all of them stop at one step;
    Ctrl-C is passed on as SIGTERM. Afterwards SIGTERM ends the process again.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        several = parallel.process_count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._pass_on if several else self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if parallel.process_count() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def requested(self, step: int, processes: Preemptible) -> bool:
        """Whether to save and stop after this iteration; every process gets the same answer."""
        if parallel.process_count() > 1:
            if processes.reached_preemption(step):
                self.signal = self.signal or signal.SIGTERM
                return True
            return False
        return self.signal is not None

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            # Straight out: no handler, no thread and no half-written file of ours can hold the program.
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after this iteration; once more leaves at once\n")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        os.kill(os.getpid(), signal.SIGTERM)
