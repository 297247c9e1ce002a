"""Config files and overrides on the command line."""

from pathlib import Path

import pytest

from jem_jax.commands import config_files
from jem_jax.common.errors import UserError


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _written(text, name="mine.py"):
    """Its name, in the working folder, as a user has it."""
    Path(name).write_text(text)
    return name


def _error(*arguments):
    with pytest.raises(UserError) as caught:
        config_files.read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


GOOD = "from jem_jax.config import default\n\ndef get_config():\n    config = default()\n    return config\n"


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_what_comes_with_the_package_is_found_from_anywhere(name):
    assert config_files.read(name).data.name == "digits"


def test_a_file_of_ones_own_goes_before_the_packages():
    own = _written(GOOD.replace("    return", "    config.seed = 5\n    return"), "digits.py")
    assert config_files.read(own).seed == 5


@pytest.mark.parametrize("name", ["elsewhere/digits.py", "nope", "configs"])
def test_a_missing_file_is_said_with_those_there_are(name):
    message = _error(name)
    assert f"config file {name} does not exist" in message
    assert "digits" in message.split("package:")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n\ndef get_config(:\n    return 1\n", ", line 3: SyntaxError"),
        ("def get_config():\n    return helper()\n\ndef helper():\n    return 1 / 0\n", ", line 5: ZeroDivisionError"),
        (GOOD.replace("    return", "    config.modle.depth = 10\n    return"), ", line 5: AttributeError"),
        ("x = 1\n", " must define get_config()"),
        ("def get_config():\n    return 7\n", ": get_config() must return a ConfigDict, not int"),
        ("raise SystemExit(0)\n", ""),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, said):
    assert _error(_written(text, "mine.yaml")) == "config file mine.yaml must be a Python file, *.py"
    for name in (_written(text), str(tmp_path / "mine.py")):
        assert _error(name).startswith(f"config file {name}{said}")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("sampler.num_steps", "40", 40),
        ("optimizer.decay_epochs", "(20, 30)", (20.0, 30.0)),
        ("optimizer.decay_epochs", "()", ()),
        ("sampler.clip_x", "true", True),
        # What looks like a word or a number stays text where text is wanted.
        ("data.name", "3", "3"),
        ("model.factory", "package.module:function", "package.module:function"),
        # As people type them in a shell.
        ("optimizer.decay_epochs", "20,30", (20.0, 30.0)),
        ("evaluation.attack_linf", "0.03", (0.03,)),
        ("evaluation.attack_linf", "[2/255,0.03]", (2 / 255, 0.03)),
        ("training.epochs", "1e2", 100),
        ("data.flip", "0", False),
        ("data.flip", "Yes", True),
    ],
)
def test_overrides_are_read_as_what_the_setting_is(name, text, value):
    config = config_files.read("digits_paper", [(name, text)])
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_the_later_override_wins():
    assert config_files.read("digits", [("seed", "1"), ("seed", "2")]).seed == 2


GROUPS = "is not a setting; the groups are: data, "
WRONG_OVERRIDES = [
    *[("optimizer.learning_rate", text, f"must be above 0 and at most 100, not {float(text)}")
      for text in ("nan", "-inf", "1e400")],
    *[(name, text, "must be") for name, text in (
        ("sampler.num_steps", ""), ("optimizer.decay_epochs", "(3,"), ("sampler.clip_x", "maybe"),
        ("training.epochs", "5/2"), ("optimizer.decay_epochs", "8/0"), ("optimizer.decay_epochs", "8**255"),
        ("optimizer.learning_rate", "1,5"), ("model", "3"), ("training.epochs", "__import__('os').abort()"),
    )],
    ("modle.depth", "3", GROUPS), ("model.depth.x", "3", GROUPS),
    ("model.dept", "3", "is not a setting; did you mean config.model.depth?"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said"), WRONG_OVERRIDES)
def test_a_wrong_override_names_its_key(name, text, said):
    assert f"config.{name} {said}" in _error("digits", [(name, text)])
