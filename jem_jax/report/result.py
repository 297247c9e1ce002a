"""The outcome of a report's section: numbers for report.json, and paragraphs, tables and figures for the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """A section's outcome; plain values throughout, so that it can be kept as JSON."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """numbers of "jem" and "baseline", which report.json holds under these names"""
    how: dict[str, Any] = field(default_factory=dict)
    """how the numbers were taken: images, seeds, units, steps"""
    missing: list[str] = field(default_factory=list)
    """what could not be had this time; such an outcome is shown but not kept, so that the next call tries again"""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """the page's paragraphs, tables and figures in order"""

    def text(self, text: str) -> None:
        """A paragraph."""
        self.blocks.append({"kind": "text", "text": text})

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", folded: bool = False
    ) -> None:
        """A table of words; its first column names the rows. A folded one shows its caption until it is opened."""
        words = [list(row) for row in rows]
        self.blocks.append({"kind": "table", "head": list(head), "rows": words, "caption": caption, "folded": folded})

    def plot(self, file: Path, caption: str) -> None:
        """A plot in the report's folder; its labels must stay legible, so that a small screen scrolls it."""
        self.blocks.append({"kind": "figure", "file": file.name, "caption": caption, "look": "plot"})

    def images(self, file: Path, caption: str) -> None:
        """A grid of images in the report's folder."""
        self.blocks.append({"kind": "figure", "file": file.name, "caption": caption, "look": "images"})

    @property
    def files(self) -> list[str]:
        """Names of the figures' files."""
        return [block["file"] for block in self.blocks if block["kind"] == "figure"]


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a person reads it."""
    return f"{100 * value:.{digits}f} %"
