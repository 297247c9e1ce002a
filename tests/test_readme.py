"""What the README shows is what happens."""

import json
import re
import statistics
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


@pytest.mark.parametrize(("model", "row"), [("jem", "JEM, WRN-10-1"), ("baseline", "plain classifier")])
def test_the_results_table_is_what_was_measured(model, row):
    file = README.parent / "experiments" / "results" / "digits_seeds.json"
    runs = [run[model] for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    accuracies = [100 * run["accuracy"] for run in runs]
    nll, ece = (statistics.mean(run[name] for run in runs) for name in ("nll", "ece"))
    mean, low, high = statistics.mean(accuracies), min(accuracies), max(accuracies)
    line = next(line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row}"))
    assert line.endswith(f"| {mean:.1f} % ({low:.1f} to {high:.1f}) | {nll:.3f} | {100 * ece:.1f} % |")
