"""Grids of images as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from jem_jax.augment import to_uint8
from jem_jax.common import files
from jem_jax.runs import fonts

MADE_BY = "jem_jax"
"""what pictures say of their origin, as PNG's keyword "Software" """
_GAP = 2
_BACKGROUND = 255
_INK = 60


def grid(rows: Sequence[np.ndarray], names: Sequence[str] = ()) -> Image.Image:
    """Rows of images, each row under its name, enlarged by a whole factor to some 48 pixels an image.

    Args:
      rows: arrays [n, H, W, C] in [-1, 1] with C = 1 or 3 (other C: the first channel); n may differ, and be 0.
      names: one a row, or none.
    """
    height, width, channels = rows[0].shape[1:]
    factor = max(1, round(48 / max(height, width)))
    written = [fonts.written(name) for name in names]
    labels = [(name, ImageFont.truetype(str(font), 14)) for name, font in written]
    margin = max((int(font.getlength(name)) for name, font in labels), default=0)
    margin += 8 if margin else 0
    columns = max(len(row) for row in rows)
    step_y, step_x = height * factor + _GAP, width * factor + _GAP
    canvas = Image.new("RGB", (margin + columns * step_x + _GAP, len(rows) * step_y + _GAP), (_BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = i * step_y + _GAP
        if names:
            name, font = labels[i]
            draw.text((margin - 6, top + height * factor // 2), name, (_INK,) * 3, font, anchor="rm")
        for j, pixels in enumerate(to_uint8(row)):
            image = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).convert("RGB")
            enlarged = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + j * step_x + _GAP, top))
    return canvas


def square(images: np.ndarray) -> Image.Image:
    """Images [N, H, W, C] in a grid about as wide as high."""
    columns = max(1, int(np.ceil(np.sqrt(len(images)))))
    return grid([images[start : start + columns] for start in range(0, len(images), columns)])


def save(image: Image.Image, path: Path) -> Path:
    """Writes the PNG whole or not at all, and makes its folder."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", MADE_BY)
    with files.whole(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)
    return path


def is_ours(path: Path) -> bool:
    """Whether a PNG is one that this program wrote."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == MADE_BY
    except OSError:
        return False
