"""Every script of experiments/ imports what there is, and is in the table of experiments/README.md."""

import ast
import importlib.util
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.rglob("*.py"))


def exists(module: str, name: str) -> bool:
    """Whether `from module import name` works."""
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_imports_exist(path):
    # Read, not run: some scripts need PyTorch or foolbox, and some change the environment.
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    wanted = [(node.module, name.name) for node in nodes for name in node.names if node.module.startswith("jem_jax")]
    assert [pair for pair in wanted if not exists(*pair)] == []


def test_every_command_is_in_the_table():
    table = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    started_by_others = {"jax_worker", "torch_worker"}
    commands = {
        path for path in SCRIPTS if "__main__" in path.read_text("utf-8") and path.stem not in started_by_others
    }
    names = {".".join(path.relative_to(EXPERIMENTS.parent).with_suffix("").parts) for path in commands}
    assert {name for name in names if name not in table and f"{name.rpartition('.')[2]}.py" not in table} == set()
