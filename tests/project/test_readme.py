"""What README.md and docs/pages/ show is what happens."""

import ast
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from jem_jax import config as configuration
from jem_jax.config import Data, Model
from jem_jax.datasets import load
from jem_jax.training import network

ROOT = Path(__file__).parents[2]
README, PAGES = ROOT / "README.md", ROOT / "docs" / "pages"
SCRIPT = ROOT / "experiments" / "jem_in_100_lines.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
EXTEND = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (PAGES / "extend.md").read_text("utf-8"), re.DOTALL))


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links() -> list[tuple[Path, str]]:
    """(page, target) of every link to a file, with its anchor."""
    pages = (README, ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", *sorted(PAGES.glob("*.md")))
    return [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
    ]


def test_a_whole_jem_is_100_lines_on_five_modules():
    assert len(SOURCE.splitlines()) <= 100
    imported = {
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jem_jax")
        for name in node.names
    }
    paper = {f"jem_jax.{name}" for name in ("energy", "objective", "replay_buffer", "sgld", "wide_resnet.WideResNet")}
    assert imported == paper
    assert examples(README)[0] in SOURCE


@pytest.mark.slow
def test_accuracy_and_samples_of_the_100_lines(tmp_path):
    picture = tmp_path / "digits.png"
    # As a user runs it, but for flags with which it compiles in half the time. At the tests' own level it runs slowly.
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("level=0", "level=1")}
    del environment["JAX_NUM_CPU_DEVICES"]
    # A quarter of its iterations is enough for the accuracy that the README promises of all.
    command = [sys.executable, SCRIPT, "--iterations=150", f"--picture={picture}"]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(re.search(r"test accuracy ([\d.]+)%", ended.stdout)[1]) >= 95
    drawn = image.imread(picture)[..., 0].reshape(10, 50, 10, 50).mean(axis=(1, 3))
    # Digits have bright strokes on black: grey or noise would have a mean brightness of a half.
    assert 0.1 < drawn.mean() < 0.45


def test_the_readmes_trained_model_tells_samples_from_noise(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(examples(README)[1], "README.md", "exec"), {})
    samples, noise = map(float, capsys.readouterr().out.split())
    assert samples > noise


def test_the_composition_example_climbs():
    example = examples(PAGES / "compose.md")[0]
    assert len(example.strip().splitlines()) <= 15
    names = {}
    exec(compile(example, "compose.md", "exec"), names)
    assert names["buffer"].shape == (1000, 1, 2)
    assert np.isfinite(np.asarray(names["x"])).all()
    before = names["log_density"](names["params"], names["start"].x).mean()
    after = names["log_density"](names["params"], names["x"]).mean()
    assert after > before


def test_every_config_is_on_its_page():
    page = (PAGES / "configs.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "configs").glob("*.py")} - {"__init__.py"}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_ones_own_config_is_one():
    names = {}
    exec(compile(examples(PAGES / "configs.md")[0], "configs.md", "exec"), names)
    config = configuration.validate(names["get_config"]().to_dict())
    assert (config.data.name, config.model.width, config.training.epochs) == ("digits", 2, 80)


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda value: getattr(value, "name", value))
def test_links_lead_somewhere(page, target):
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    assert path.exists()
    # The site makes the API's anchors from names; mkdocs checks those.
    assert not anchor or name == "api.md" or anchor in slugs(path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function of a block's name that imports the block from a file, as a reader of the page would."""
    for name, text in EXTEND.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module


@pytest.mark.parametrize("name", ["my_network", "my_data", "my_sampler", "my_objective"])
def test_an_example_is_about_ten_lines(name):
    lines = EXTEND[name].splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from"))]) <= 10


def test_a_network_of_ones_own(module):
    built = network.build(Model(factory="my_network:MLP"), num_classes=7)
    x = jnp.zeros((2, 8, 8, 1))
    assert built.logits(built.init(jax.random.key(0), x), x).shape == (2, 7)


def test_data_of_ones_own(module):
    module("my_data")
    dataset = load(Data(name="stripes.npz"))
    assert dataset.class_names == ("top", "middle", "bottom")
    assert [len(split.images) for split in (dataset.train, dataset.validation, dataset.test)] == [240, 30, 30]
    rows = dataset.train.images.mean(axis=(2, 3)).reshape(-1, 4, 2).mean(axis=2)
    assert np.array_equal(rows.argmax(axis=1), dataset.train.labels)


def test_the_package_calls_the_chain_once():
    training = ROOT / "jem_jax" / "training"
    assert sum(path.read_text(encoding="utf-8").count("sgld.chain(") for path in training.glob("*.py")) == 1


def test_sampler_has_the_density_as_its_limit(module):
    mean, std, friction, step_size = 3.0, 2.0, 0.1, 0.01
    samples = jax.jit(
        lambda key, x: module("my_sampler").chain(
            key, lambda x: -0.5 * jnp.sum(((x - mean) / std) ** 2, axis=1), x,
            num_steps=1000, step_size=step_size, noise_std=math.sqrt(2 * friction * step_size), friction=friction,
        )
    )(jax.random.key(0), jnp.zeros((4000, 1)))  # fmt: skip
    assert jnp.mean(samples) == pytest.approx(mean, abs=0.15)
    assert jnp.std(samples) == pytest.approx(std, rel=0.05)


def test_objective_is_least_at_the_density_of_noisy_data(module):
    """Of N(0, 1) data with noise of standard deviation σ that is N(0, 1 + σ²)."""
    sigma, key = 0.5, jax.random.key(1)
    x = jax.random.normal(jax.random.key(0), (20_000, 1))

    def loss(precision):
        density = lambda x: -0.5 * precision * jnp.sum(x**2, axis=1)  # noqa: E731
        return module("my_objective").score_matching(key, density, x, sigma=sigma)

    best = 1 / (1 + sigma**2)
    slope, curvature = jax.grad(loss)(best), jax.grad(jax.grad(loss))(best)
    assert -slope / curvature == pytest.approx(0, abs=0.03)
