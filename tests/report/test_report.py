"""The report: sections that are measured, kept and fail on their own, and the page that a person reads."""

import dataclasses
import functools
import json
import re
import shutil
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from command import TINY, contents, digits_npz, finished_run
from PIL import Image
from scipy.special import logsumexp

import jem_jax
from jem_jax import config, datasets, report
from jem_jax.augment import to_float
from jem_jax.common import files
from jem_jax.config import Evaluation
from jem_jax.datasets import ood_sets
from jem_jax.evaluation import adversarial, calibration, classification, inpainting, ood
from jem_jax.main import main
from jem_jax.report import adversarial as adversarial_section
from jem_jax.report import html, inputs, sections, summary
from jem_jax.report.result import Result
from jem_jax.report.sections import Outcome, Section
from jem_jax.runs import workdir

WHOLE = (
    *TINY,
    "--config.evaluation.sections=all",
    "--config.training.baseline=true",
    "--config.evaluation.ood_images=20",
    "--config.evaluation.attack_images=12",
    "--config.evaluation.attack_steps=2",
    "--config.evaluation.attack_linf=(0.1,0.3)",
    "--config.evaluation.attack_l2=(0.5,)",
    "--config.evaluation.refined_images=4",
    "--config.evaluation.refined_linf=(0.1,)",
)
FIGURES = {
    "confusion", "reliability", "ood_histograms", "robustness", "training", "buffer_by_class", "distal_baseline",
    "distal_jem", "density_extremes", "film_strip", "inpainting", "nearest_training_images", "samples",
    "samples_by_class",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The workdir of a finished run with every section; not to be changed."""
    run = shutil.copytree(finished_run(), tmp_path_factory.mktemp("whole") / "run")
    assert main([*WHOLE, f"--workdir={run}"]) == 0
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def _values(run: Path) -> dict:
    return json.loads((run / "report" / "report.json").read_text())


class _Page(HTMLParser):
    """Every tag in its place with its attributes, and the texts with the tag before them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = [("", {})]
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.elements[-1][0], data))

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements[1:]}

    @property
    def words(self) -> str:
        return "".join(text for _, text in self.texts)

    def values(self, *names: str) -> list[str]:
        """The values of these attributes."""
        return [attributes[name] for _, attributes in self.elements for name in names if name in attributes]


def test_every_section_is_there_with_numbers_of_both_models(whole):
    values = _values(whole)
    assert list(values["sections"]) == [section.name for section in sections.SECTIONS]
    assert not any(some["failure"] for some in values["sections"].values())
    assert all(some["how"] for some in values["sections"].values())
    for model in ("jem", "baseline"):
        found = values[model]
        assert {"accuracy", "nll", "brier", "recall", "confusion", "ece", "mce", "temperature", "ood", "pgd",
                "distal"} <= found.keys()  # fmt: skip
        assert list(found["pgd"]["linf"]) == ["0", "0.1", "0.3"]
        assert list(found["pgd"]["l2"]) == ["0", "0.5"]
        assert len(found["ood"]) == 7
        for scores in found["ood"].values():
            assert len(scores) == 7
            assert all(0 <= score["auroc"] <= 1 for score in scores.values())
    assert values["jem"]["pgd"]["refined_linf"].keys() == {
        "jem_0_straight_through", "jem_1_straight_through", "jem_1_backpropagated",
        "jem_10_straight_through", "jem_10_backpropagated",
    }  # fmt: skip
    assert {"test images", "replay buffer", "fresh chains", "uniform noise"} == values["jem"]["sample_quality"].keys()
    assert values["jem"]["inpainting"].keys() == {"lower half", "right half", "centre"}


@pytest.mark.parametrize("model", ["jem", "baseline"])
def test_numbers_are_those_of_the_trained_model(whole, model):
    found, test = _values(whole)[model], datasets.load(config.Data()).test
    loaded = jem_jax.load(whole, baseline=model == "baseline")
    logits = np.asarray(loaded.logits(to_float(test.images)))
    assert found["accuracy"] == pytest.approx(classification.accuracy(logits, test.labels), abs=1e-9)
    assert found["nll"] == pytest.approx(classification.negative_log_likelihood(logits, test.labels), rel=1e-4)
    expected = calibration.expected_calibration_error(logits, test.labels)
    assert found["ece"] == pytest.approx(expected, rel=1e-3)
    facts = workdir.read_facts(whole)
    seen = inputs.Subject(whole, facts, datasets.load(config.Data()), {})
    inside = to_float(seen.some_test(20).images)
    outside = ood_sets.builtin(test, 20, seed=facts.config.seed)["uniform_noise"].images
    density = [np.asarray(logsumexp(loaded.logits(images), axis=-1)) for images in (inside, outside)]
    auroc = found["ood"]["uniform_noise"]["log_density"]["auroc"]
    assert auroc == pytest.approx(ood.auroc(*density), abs=0.02)


@pytest.fixture
def seen(whole, tmp_path) -> inputs.Subject:
    """What the sections see of it, with their own folder and settings."""
    facts, dataset = workdir.read_facts(whole), datasets.load(config.Data())
    settings = Evaluation(
        num_samples=20, sample_steps=7, attack_images=9, attack_steps=2, attack_restarts=3, attack_linf=(0.1, 0.3),
        attack_l2=(0.02,), refined_linf=(),
    )  # fmt: skip
    facts = dataclasses.replace(facts, config=dataclasses.replace(facts.config, evaluation=settings))
    return dataclasses.replace(inputs.read(whole, facts, dataset), path=tmp_path)


def test_both_models_are_attacked_as_the_settings_say(seen, monkeypatch):
    attacks, how, over_examples, pgd = [], [], inputs.Subject.over_examples, adversarial.pgd

    def watched(subject, function, chains=0):
        run = over_examples(subject, function, chains)

        def noted(name, key, x, labels, epsilon, norm, **more):
            margins = run(name, key, x, labels, epsilon, norm, **more)
            attacks.append((name, *np.unique(norm), *np.unique(epsilon), len(x), (margins < 0).sum()))
            logits = seen.logits(name, x)
            assert (logits.argmax(axis=1) == labels).all()
            if epsilon[0] < 0.2:
                # The images that stand least firmly come first.
                assert (np.diff(np.diff(np.sort(logits))[:, -1]) >= 0).all()
            if (name, norm[0]) == ("jem", 1):
                logits_fn = functools.partial(seen.jem.network.logits, seen.models[name].variables)
                by_hand = {"norm": "l2", "num_steps": 2, "restarts": 3}
                direct = pgd(key, lambda _, x: logits_fn(x), jnp.asarray(x), jnp.asarray(labels), 0.02, **by_hand)[1]
                np.testing.assert_allclose(margins, direct, rtol=1e-3, atol=1e-4)
            return margins

        return noted

    monkeypatch.setattr(inputs.Subject, "over_examples", watched)
    monkeypatch.setattr(adversarial, "pgd", lambda *args, **settings: how.append(settings) or pgd(*args, **settings))
    (seen.path / "report").mkdir()
    found = adversarial_section.attack(seen).models
    # Traced once for all norms, ε and both models.
    assert [(call["num_steps"], call["restarts"]) for call in how] == [(2, 3)]
    # Only images that still stand are attacked.
    expected = []
    for number, (norm, epsilons) in enumerate({"linf": ("0", "0.1", "0.3"), "l2": ("0", "0.02")}.items()):
        for name in ("jem", "baseline"):
            assert tuple(found[name]["pgd"][norm]) == epsilons
            standing = [round(9 * accuracy) for accuracy in found[name]["pgd"][norm].values()]
            for epsilon, before, after in zip(epsilons[1:], standing, standing[1:], strict=False):
                if before:
                    expected.append((name, number, pytest.approx(float(epsilon)), before, after))
    assert attacks == expected
    assert len(attacks) > 2


def test_samples_are_chains_of_so_many_steps_with_and_without_a_class(seen, monkeypatch):
    made, inpaint = [], inpainting.inpaint

    def watched(keys, density, x, known, **how):
        made.append(how)
        return inpaint(keys, density, x, known, **how)

    monkeypatch.setattr(inpainting, "inpaint", watched)
    drawn = inputs.fresh_chains(inputs.Sampler(seen.facts.config, seen.jem, 3), seen.facts, seen.dataset)
    # Traced once for both; seven steps have no more than one state that lies as far from the next.
    assert [(how["num_steps"], how["every"], how["noise_std"]) for how in made] == [(7, 7, 0.01)]
    assert {name: chains.shape for name, chains in drawn.items()} == {
        "by_class": (20, 2, 8, 8, 1),
        "unconditional": (20, 2, 8, 8, 1),
    }
    logits = seen.logits("jem", drawn["by_class"][:, -1]), seen.logits("jem", drawn["by_class"][:, 0])
    rows, classes = np.arange(20), np.repeat(np.arange(seen.facts.num_classes), 20 // seen.facts.num_classes)
    assert (logits[0][rows, classes] > logits[1][rows, classes]).mean() > 0.9


def test_the_page_needs_nothing_else_and_every_figure_is_a_picture(whole):
    pictures = {path.stem: Image.open(path).convert("L") for path in (whole / "report").glob("*.png")}
    assert pictures.keys() == FIGURES
    for name, picture in pictures.items():
        assert min(picture.size) > 40, name
        assert len(np.unique(np.asarray(picture))) > 8, name
    found = _Page((whole / "report" / "report.html").read_text())
    fetched = found.values("src", "data", "srcset")
    assert len(fetched) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in fetched)
    assert not {"script", "link", "iframe", "object"} & found.tags
    assert any(content.startswith("default-src 'none'") for content in found.values("content"))
    names = {section.name for section in sections.SECTIONS}
    assert set(found.values("href")) == {f"#{name}" for name in names}
    assert names <= set(found.values("id"))
    assert len(list(filter(None, found.values("alt")))) == len(FIGURES)
    for model in ("jem", "baseline"):
        assert f"{100 * _values(whole)[model]['accuracy']:.2f} %" in found.words
    cells = [text for tag, text in found.texts if tag == "td"]
    assert len(cells) > 200
    assert not [cell for cell in cells if "nan" in cell.lower()]


def _measured(output: str) -> set[str]:
    """The sections that a command has measured."""
    lines = re.findall(r"^  \[\d/\d\] (\w+): (.*)", output, re.MULTILINE)
    assert len(lines) == len(sections.SECTIONS)
    return {name for name, said in lines if said != "as before"}


def test_only_what_is_missing_damaged_set_otherwise_or_failed_is_measured(run, monkeypatch, capsys):
    def fail(_):
        raise ValueError("no <b>luck</b>\nat all")

    broken = Section("classification", "What", "", fail)
    some = tuple(broken if section.name == broken.name else section for section in sections.SECTIONS)
    (run / "report" / "confusion.png").unlink()
    (run / "report" / "sections" / "training.json").write_text("{")
    arguments = [*WHOLE, f"--workdir={run}", "--mode=evaluate", "--config.evaluation.ece_bins=7"]
    with monkeypatch.context() as patch:
        patch.setattr(sections, "SECTIONS", some)
        assert main(arguments) == 1
    output = capsys.readouterr().out
    assert "FAILED: ValueError: no <b>luck</b> (test_report.py:" in output
    assert "section classification failed: ValueError: no <b>luck</b>" in output
    assert _measured(output) == {"classification", "training", "calibration"}
    failures = {name: some["failure"] for name, some in _values(run)["sections"].items() if some["failure"]}
    assert failures.keys() == {"classification"}
    assert "no <b>luck</b>" in failures["classification"]
    text = (run / "report" / "report.html").read_text()
    assert "no &lt;b&gt;luck" in text
    assert "<b>luck" not in text

    before = contents(run / "report")
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "FAILED" not in output
    assert _measured(output) == {"classification"}
    changed = {Path(name).name for name, text in contents(run / "report").items() if before.get(name) != text}
    assert "confusion.png" in changed
    assert changed <= {"report.json", "report.html", "classification.json", "confusion.png"}


def test_a_section_that_there_is_not_is_refused_before_the_run(tmp_path, capsys):
    for named in ("clasification", "all,ood", "ood,,training"):
        assert main([*TINY, f"--config.evaluation.sections={named}", f"--workdir={tmp_path / 'run'}"]) == 2
        error = capsys.readouterr().err
        assert "config.evaluation.sections" in error
        assert "classification, calibration, ood" in error
        assert not (tmp_path / "run").exists()
    # Whatever the order in the settings, it is the page's.
    wanted = sections.wanted(Evaluation(sections=" training ,classification"))
    assert [section.name for section in wanted] == ["classification", "training"]


def test_a_damaged_report_is_none(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("x")
    for damage in ("", "[]", '{"run": 3}', '{"run": {"iterations": 1}, "sections": {}}'):
        (tmp_path / "report" / "report.json").write_text(damage)
        assert report.read(tmp_path) is None


def _about(**models) -> dict:
    run = {"data": "<i>data</i>", "iterations": 1, "seed": 0, "split_sizes": {}, "devices": "one", "seconds": {},
           "versions": {}, "trained_on_other_data": False}  # fmt: skip
    return {"run": run, "sections": {}, **models}


def test_names_from_outside_are_escaped(tmp_path):
    result = Result(how={"<b>how</b>": ["<u>"]})
    result.text("<script>alert(1)</script>")
    result.table(("<em>",), [("<td>",)], "<caption>", folded=True)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    result.images(tmp_path / "a.png", '"><script>')
    section = Section("some", "<h1>", "<p>", lambda _: result)
    text = html.render(_about(jem={}), [Outcome(section, result, 0.1)], tmp_path)
    found = _Page(text)
    assert not {"script", "i", "b", "u", "em", "caption"} & found.tags
    for words in ("<script>alert(1)</script>", "<em>", "<caption>", "<i>data</i>", "<b>how</b>", "<u>"):
        assert words in found.words
    assert found.values("alt") == ['"><script>']


def test_the_better_model_is_marked_but_for_a_draw_or_nan():
    jem, baseline = {"accuracy": 0.98, "nll": 0.2, "ece": 0.03}, {"accuracy": 0.98001, "nll": 0.1, "ece": 0.04}
    for nll, better in ((0.2, "baseline"), (float("nan"), "")):
        found = {line.title: line.better for line in summary.lines(_about(jem={**jem, "nll": nll}, baseline=baseline))}
        assert found == {"accuracy": "", "NLL, nats": better, "calibration error (ECE)": "jem"}


def test_the_headline_has_the_mean_auroc_and_the_middle_attack():
    scores = {name: {score: {"auroc": auroc} for score in ("log_density", "approximate_mass", "max_posterior")}
              for name, auroc in (("a", 0.4), ("b", 0.9))}  # fmt: skip
    values = _about(jem={"ood": scores, "pgd": {"linf": {"0": 1.0, "0.1": 0.5, "0.2": 0.25, "0.3": 0.125}}})
    lines = {line.title: line.cells["jem"] for line in summary.lines(values)}
    assert lines["AUROC of log p~(x), mean of 2 outside sets"] == "0.650"
    assert lines["accuracy under PGD, L∞ ε 0.2"] == "25.0 %"
    assert "JEM" in summary.as_text(values).splitlines()[0]


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "file"
    with files.whole(target) as partial:
        partial.write_text("old")
        assert not target.exists()
    with suppress(RuntimeError), files.whole(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_an_export_is_what_fid_tools_read_and_replaces_an_older_one(run):
    folder = run / "samples" / "export"
    (folder / "unconditional").mkdir(parents=True)
    (folder / "unconditional" / "000020.png").touch()
    assert main([*WHOLE, f"--workdir={run}", "--mode=sample", "--config.evaluation.num_samples=20"]) == 0
    for kind, count in (("unconditional", 20), ("by_class", 20), ("buffer", 128)):
        with np.load(folder / f"{kind}.npz", allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            assert (images.shape, images.dtype) == ((count, 8, 8, 3), np.uint8)
            if kind == "by_class":
                assert arrays["arr_1"].tolist() == np.repeat(np.arange(10), 2).tolist()
        names = sorted(path.name for path in (folder / kind).iterdir())
        assert names == [f"{number:06d}.png" for number in range(count)]
        np.testing.assert_array_equal(np.asarray(Image.open(folder / kind / names[3])), images[3])


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[31m'onclick='\n<b>", *"3456789")


def test_a_hostile_data_set_puts_nothing_into_the_page_or_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = '\x1b]0;t\x07"><svg onload=alert(1)>\n.npz'
    digits_npz(tmp_path / name, names=HOSTILE)
    arguments = [*TINY, f"--config.data.name={name}", "--workdir=run\x1b[31m"]
    assert main([*arguments, "--config.evaluation.sections=classification,training"]) == 0
    assert main([*TINY, "--config.data.name=\x1b]0;title\x07.npz"]) == 2
    output, errors = capsys.readouterr()
    assert r"\x1b]0;title\x07" in errors
    assert all(line.isprintable() for line in (output + errors).split("\n"))
    found = _Page((tmp_path / "run\x1b[31m" / "report" / "report.html").read_text())
    assert not {"script", "svg", "b"} & found.tags
    assert {"table", "img", "details"} <= found.tags
    names = {name for _, attributes in found.elements for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "href", "id", "class", "alt", "src"}
    assert all(source.startswith("data:image/png;base64,") for source in found.values("src"))
