"""The config files of a checkout, which lie beside the package; an installed package holds a folder of this name."""

from pathlib import Path

__path__ = [str(Path(__file__).parent.parent / "configs")]
