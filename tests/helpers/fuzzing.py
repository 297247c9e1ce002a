"""How long the fuzz tests look: always at the same few examples, or, by FUZZ_FACTOR, at that many times more and new
ones (`python -m experiments.checks.fuzz`)."""

import os
import struct
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
LONG = FACTOR > 1


class Trap:
    """Creates a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers in an .npy file."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def examples(number: int) -> settings:
    """Of the short form."""
    return settings(
        deadline=None,
        derandomize=not LONG,
        max_examples=number * FACTOR,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        print_blob=True,
    )
