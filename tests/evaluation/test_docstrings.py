"""The examples in the docstrings of `jem_jax.evaluation` give what they say."""

import doctest
import importlib
from pathlib import Path

import jax
import pytest

from jem_jax import evaluation
from jem_jax.evaluation import adversarial

FOLDER = Path(evaluation.__path__[0])
MODULES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__", "fid"})
"""All but what needs Inception's weights."""
COMPILED = {"adversarial": {"pgd": jax.jit(adversarial.pgd, static_argnames=("classifier", "norm"))}}
"""what takes seconds operation by operation"""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"jem_jax.evaluation.{name}"), extraglobs=COMPILED.get(name))
    assert found.attempted > 0
    assert found.failed == 0
