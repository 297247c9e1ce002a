"""Scripts of experiments/, which is no package, as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXPERIMENTS = str(Path(__file__).parent.parent / "experiments")


def load(name: str) -> ModuleType:
    """experiments/NAME.py."""
    sys.path.insert(0, EXPERIMENTS)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(EXPERIMENTS)
