"""The tables on the pages are those of the raw results."""

import re
import statistics

import pytest
import scripts

make_tables = scripts.load("make_tables")


@pytest.fixture(scope="module", params=make_tables.PAGES, ids=lambda page: page.name)
def text(request):
    return request.param.read_text(encoding="utf-8")


def test_pages_are_up_to_date_with_whole_tables_and_no_open_mark(text):
    assert make_tables.fill(text) == text
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(make_tables.MARKED.findall(text))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block.splitlines()[0]


def test_every_table_is_on_one_page():
    names = [name for page in make_tables.PAGES for _, name, _ in make_tables.MARKED.findall(page.read_text("utf-8"))]
    assert sorted(names) == sorted(make_tables.TABLES)


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        make_tables.fill("<!-- table: nonsense -->\n<!-- end -->")


def test_numbers_are_means_over_seeds():
    runs = make_tables.read("digits_seeds")["runs"]
    accuracies = [100 * run["jem"]["accuracy"] for run in runs]
    expected = f"{statistics.mean(accuracies):.1f} ({min(accuracies):.1f} to {max(accuracies):.1f})"
    assert f"| JEM | {expected} |" in make_tables.digits_classification()


def test_the_better_model_is_bold():
    assert make_tables.bold_best([0.2, 0.7], ["a", "b"], max) == ["a", "**b**"]
    assert make_tables.bold_best([0.2, 0.7], ["a", "b"], min) == ["**a**", "b"]


def test_a_change_counts_only_where_all_seeds_agree(monkeypatch):
    def run(accuracy):
        columns = {"accuracy": accuracy, "ece": 0.1, "pgd_linf": 0.5, "training_seconds": 1.0, "recoveries": 0}
        auroc = {name: {"approximate_mass": 0.5, "log_density": 0.5} for name in ("midpoints_of_classes", "rotated",
                                                                                  "photographs")}  # fmt: skip
        return {**columns, "auroc": auroc, "buffer": {"frechet_distance": 1.0, "mean_confidence": 0.5}}

    runs = {"JEM/0": run(0.5), "JEM/1": run(0.6), "+ a/0": run(0.7), "+ a/1": run(0.8), "+ b/0": run(0.65),
            "+ b/1": run(0.75)}  # fmt: skip
    monkeypatch.setattr(make_tables, "read", lambda _: {"runs": runs})
    rows = make_tables.ablation_changes("any").splitlines()[2:]
    assert rows == ["| + a | accuracy |  |", "| + b |  |  |", "| all of them, beside JEM | accuracy |  |"]
