"""Folders import downwards only; the paper's files and `evaluation/` import no other folder."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import jem_jax

ROOT = Path(jem_jax.__file__).parent
ORDER = ("commands", "report", "training", "runs", "datasets", "distributed", "evaluation", "paper", "common")
TYPED = {"__init__", "main", "import_official", "torch_import"}
"""At the top because people type them; they may import any folder."""


def layer(module: str) -> str:
    """The folder of a module "a.b", or "paper" for a file at the top."""
    return module.split(".")[0] if "." in module or (ROOT / module).is_dir() else "paper"


def imports() -> list[tuple[str, str]]:
    """(importing module, imported module) inside the package, relative to it."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        importer = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jem_jax":
                base = (node.module or "").split(".")[1:]
                for name in node.names:
                    parts = [*base, name.name]
                    is_module = (ROOT.joinpath(*parts).with_suffix(".py")).exists() or ROOT.joinpath(*parts).is_dir()
                    found.append((importer, ".".join(parts if is_module else base)))
    return [pair for pair in found if pair[1]]


def test_folders_import_downwards_only():
    for importer, imported in imports():
        own = layer(importer)
        if importer in TYPED:
            continue
        if importer == "config":
            allowed = ("paper", "common")
        elif own in ("paper", "evaluation"):
            allowed = (own, "paper")
            assert imported != "config", f"{importer} imports config"
        else:
            allowed = ORDER[ORDER.index(own) :]
        assert layer(imported) in allowed, f"{importer} imports {imported}"


def test_no_import_cycle():
    edges: dict[str, set[str]] = {}
    for importer, imported in imports():
        edges.setdefault(importer.removesuffix(".__init__"), set()).add(imported)
    graphlib.TopologicalSorter(edges).prepare()


READS_CONFIGS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.modules.update(dict.fromkeys(["jax", "flax", "optax", "chex", "orbax", "tensorflow_datasets", "numpy"]))
from jem_jax.commands import config_files
import jem_jax.configs
assert jem_jax.configs.__file__.endswith("configs.py"), jem_jax.configs.__file__
for name, file in sorted(config_files.packaged().items()):
    config_files.read(str(file))
    print(name)
"""


def test_configs_of_a_checkout_are_read_with_ml_collections_alone():
    """Where nothing is installed: a module that is None cannot be imported."""
    ended = subprocess.run(
        [sys.executable, "-c", READS_CONFIGS], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == sorted(file.stem for file in ROOT.parent.glob("configs/[!_]*.py"))


def test_few_files_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 16


def test_the_step_reads_as_algorithm_1():
    """Flat functions at module level, none of which takes the whole config."""
    text = (ROOT / "training" / "step.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    step = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "train_step")
    assert len(step.body) <= 30
    for path in ("step.py", "negatives.py"):
        tree = ast.parse((ROOT / "training" / path).read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                annotations = [ast.unparse(one.annotation) for one in function.args.args if one.annotation]
                assert "Config" not in annotations, f"{function.name} takes the whole config"
