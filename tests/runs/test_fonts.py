"""Names in any script are drawn, and what no font has is written as its number, without a warning."""

import warnings

import numpy as np
import pytest

from jem_jax.report import figures
from jem_jax.runs import fonts, image_grid


@pytest.mark.parametrize(
    "name",
    ["Größe", "кот", "γάτα", "ネコ猫", "two\nlines", "می\u200cخواهم", 40 * "long ", 200 * "猫", r"a$\frac{$"],
)
def test_names_of_every_script(tmp_path, name):
    drawn, font = fonts.written(name)
    assert fonts._covers(font, drawn)
    with warnings.catch_warnings(action="error"):
        figures.confusion({"jem": np.eye(2)}, (name, "other"), tmp_path / "confusion.png")
        pictures = [image_grid.grid([np.zeros((1, 8, 8, 1))], [text]) for text in (name, "?")]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert np.asarray(pictures[0]).min() < 128


@pytest.mark.parametrize("names", [("猫", "狗"), ("ไทย", "ไทร"), ("हिन्दी", "हिन्दु"), ("한국어", "한국인"), ("e", "é")])
def test_two_names_of_one_script_look_different(names):
    one, other = (image_grid.grid([np.zeros((1, 8, 8, 1))], [name]).tobytes() for name in names)
    assert one != other


def test_accents_are_no_boxes_and_what_no_font_has_is_its_number(monkeypatch):
    assert fonts.written("é") == ("é", fonts._dejavu())
    monkeypatch.setattr(fonts, "_fonts", lambda _: [fonts._dejavu()])
    fonts.written.cache_clear()
    assert fonts.written("n02085620-" + 50 * "x" + "-dog")[0] == "n02085620-xxxxxxxxxx...xxxxxxxxxx-dog"
    assert fonts.written("猫 b")[0] == "U+732B  b"
    fonts.written.cache_clear()
