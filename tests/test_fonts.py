"""Names in any script are drawn, and what no font has is written as its number, without a warning."""

import warnings

import numpy as np
import pytest

from jem_jax.report import figures
from jem_jax.runs import fonts, image_grid


@pytest.mark.parametrize("name", ["cat", "café", "Größe", "кот", "γάτα", "ネコ猫", "two\nlines", "می\u200cخواهم"])
def test_names_of_every_script(tmp_path, name):
    drawn, font = fonts.written(name)
    assert fonts._covers(font, drawn)
    with warnings.catch_warnings(action="error"):
        figures.confusion({"jem": np.eye(2)}, (name, "other"), tmp_path / "confusion.png")
        pictures = [image_grid.grid([np.zeros((1, 8, 8, 1))], [text]) for text in (name, "?")]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert np.asarray(pictures[0]).min() < 128


def test_accents_are_no_boxes_and_what_no_font_has_is_its_number(monkeypatch):
    assert fonts.written("é") == ("é", fonts._dejavu())
    monkeypatch.setattr(fonts, "_fonts", lambda _: [fonts._dejavu()])
    fonts.written.cache_clear()
    assert fonts.written("猫 b")[0] == "U+732B  b"
    fonts.written.cache_clear()
