"""The font for a name: DejaVu Sans, which matplotlib brings, or an installed one that has all its characters."""

import functools
import importlib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 40


@functools.cache
def written(name: str) -> tuple[str, Path]:
    """A name as it can be drawn, and the file of a font that has all of its characters.

    A character that no font on this machine has is written as its number, such as U+732B, as is one that would end the
    line. Invisible marks, such as those between joined letters, are dropped, and so is the middle of what is overlong.
    """
    name = "".join(c for c in name if unicodedata.category(c) != "Cf")
    chosen = next((font for font in _fonts(name) if _covers(font, name)), None)
    if chosen is not None:
        return _short(name), chosen
    plain = _dejavu()
    return _short("".join(c if _covers(plain, c) else f"U+{ord(c):04X} " for c in name).rstrip()), plain


def _short(text: str) -> str:
    """A picture has no room for more beside it."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 3 :]}"


def families(names: Iterable[str]) -> list[str]:
    """Matplotlib's names of the fonts for these names, DejaVu Sans first."""
    used = dict.fromkeys([_dejavu(), *(written(name)[1] for name in names)])
    from matplotlib import ft2font

    return [ft2font.FT2Font(str(font)).family_name for font in used]


def import_matplotlib() -> None:
    """Imports it, only where it is used: every command would wait a second for it."""
    # It refuses to be imported where this names a backend that it does not know.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _fonts(name: str) -> list[Path]:
    plain = _dejavu()
    if _covers(plain, name):
        return [plain]
    # Looks through all installed fonts, which takes seconds the first time.
    from matplotlib import font_manager

    # But for the one of last resort, whose sign for a character is its script's: all of a script look the same.
    fonts = (font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort"))
    return sorted({Path(font.fname) for font in fonts})


def _covers(font: Path, text: str) -> bool:
    return all(c == " " or (c.isprintable() and ord(c) in _characters(font)) for c in text)


@functools.cache
def _characters(font: Path) -> frozenset[int]:
    import_matplotlib()
    from matplotlib import ft2font

    try:
        return frozenset(ft2font.FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError):  # a font that was deleted, or is damaged
        return frozenset()


@functools.cache
def _dejavu() -> Path:
    import_matplotlib()
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
