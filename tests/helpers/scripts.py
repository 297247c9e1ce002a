"""Scripts of experiments/ as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    """experiments/NAME.py or experiments/FOLDER/NAME.py."""
    [path] = (ROOT / "experiments").rglob(f"{name}.py")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
