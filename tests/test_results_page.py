"""The pages of results say what the stored results say."""

import statistics
from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results_page():
    return scripts.load("results_page")


def test_the_page_is_that_of_the_stored_results(results_page):
    text = results_page.page(results_page.read("digits_seeds"), results_page.read("digits_claims"))
    assert (ROOT / "docs" / "results.md").read_text() == text
    # Every picture that the page shows is there.
    for link in text.split("](")[1:]:
        target = link.split(")")[0]
        assert target.startswith(("http", "#")) or (ROOT / "docs" / target).exists(), target


def test_the_readmes_numbers_are_the_stored_ones(results_page):
    text = (ROOT / "README.md").read_text()
    digits = results_page.read("digits_seeds")
    assert results_page.readme(text, digits, results_page.read("cifar10_fast")) == text
    cells = []
    for model in ("jem", "baseline"):
        accuracies = [100 * run[model]["accuracy"] for run in digits["runs"]]
        cells.append(f"{statistics.mean(accuracies):.1f} % ({min(accuracies):.1f} to {max(accuracies):.1f})")
    assert f"| accuracy | {cells[0]} | {cells[1]} |" in text
