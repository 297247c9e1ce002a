"""The examples in the docstrings of `jem_jax.evaluation` give what they say."""

import doctest
import importlib
from pathlib import Path

import jax
import pytest

from jem_jax import evaluation
from jem_jax.evaluation import adversarial, distal, ood

FOLDER = Path(evaluation.__path__[0])
MODULES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__", "fid"})
"""All but what needs Inception's weights."""
STATIC = {
    adversarial: {"pgd": ("classifier", "norm"), "refined": ("logits_fn", "num_steps", "copies"), "margin": ()},
    ood: {"scores": ("logits_fn", "num_steps")},
    distal: {"ascend": ("logits_fn",)},
}
"""what takes long operation by operation, and its arguments that are no arrays"""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"jem_jax.evaluation.{name}")
    statics = STATIC.get(module, {}).items()
    compiled = {name: jax.jit(getattr(module, name), static_argnames=names) for name, names in statics}
    found = doctest.testmod(module, extraglobs=compiled)
    assert found.attempted > 0
    assert found.failed == 0
