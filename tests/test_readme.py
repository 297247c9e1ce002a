"""What the README shows is what happens."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"


def _examples():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_composition_example_runs_in_at_most_fifteen_lines():
    example = next(text for text in _examples() if "replay_buffer" in text)
    assert len(example.strip().splitlines()) <= 15
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["buffer"].shape == (1000, 1, 2)
    assert np.isfinite(np.asarray(names["x"])).all()
    # The chains climbed: that is what the example is there to show.
    before = names["log_density"](names["params"], names["start"].x).mean()
    after = names["log_density"](names["params"], names["x"]).mean()
    assert after > before


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_what_the_readme_links_to_exists(target):
    assert (README.parent / target).exists()
