"""Settings: what is right is taken, what is wrong is said in one line that names the key."""

import dataclasses
import importlib.util
from pathlib import Path

import ml_collections
import pytest

from jem_jax import config as configuration
from jem_jax.common.errors import UserError
from jem_jax.config import Config

CONFIGS = sorted(path for path in (Path(__file__).parent.parent / "configs").glob("*.py") if path.stem != "__init__")


def _nested(key, value):
    *groups, name = key.split(".")
    settings = {name: value}
    for group in reversed(groups):
        settings = {group: settings}
    return settings


def _error(key, value):
    with pytest.raises(UserError) as caught:
        configuration.validate(_nested(key, value))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _keys(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_defaults_are_valid():
    assert configuration.validate(configuration.default()) == Config()
    assert configuration.validate({}) == Config()


def test_a_config_dict_and_nested_dicts_are_the_same_to_it():
    nested = {"sampler": {"num_steps": 40}, "optimizer": {"decay_epochs": [20, 30.5]}, "seed": 3}
    override = configuration.default()
    override.sampler.num_steps = 40
    override.optimizer.decay_epochs = (20.0, 30.5)
    override.seed = 3
    expected = Config(
        sampler=configuration.Sampler(num_steps=40),
        optimizer=configuration.Optimizer(decay_epochs=(20.0, 30.5)),
        seed=3,
    )
    assert configuration.validate(nested) == expected
    assert configuration.validate(ml_collections.ConfigDict(nested)) == expected
    assert configuration.validate(override) == expected


def test_settings_survive_being_written_down():
    config = configuration.validate({"model": {"norm": "batch"}, "optimizer": {"decay_epochs": (1, 2)}})
    assert configuration.validate(configuration.as_dict(config)) == config


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3


def test_an_integer_is_a_float_where_a_float_is_wanted():
    assert configuration.validate({"sampler": {"step_size": 2}}).sampler.step_size == 2.0


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.dept", "did you mean config.model.depth?"),
        ("sampler.nun_steps", "did you mean config.sampler.num_steps?"),
        ("optimiser", "did you mean config.optimizer?"),
        ("sed", "did you mean config.seed?"),
        ("model.xyzzy", "there are: factory, depth, width"),
        ("num_steps", "did you mean config.sampler.num_steps?"),
        ("nonsense", "there are: data, model, sampler"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_that_exists(key, hint):
    message = _error(key, 1)
    assert f"config.{key} is not a setting" in message
    assert hint in message


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("sampler.num_steps", 2.5, "of type int"),
        ("sampler.num_steps", "20", "of type int"),
        ("sampler.num_steps", True, "of type int"),
        ("sampler.num_steps", None, "of type int"),
        ("seed", 1.0, "of type int"),
        ("sampler.step_size", "1.0", "of type float"),
        ("sampler.step_size", True, "of type float"),
        ("sampler.clip_x", 1, "of type bool"),
        ("sampler.clip_x", "yes", "of type bool"),
        ("model.norm", 3, "of type str"),
        ("data.name", ("digits",), "of type str"),
        ("optimizer.decay_epochs", 20, "a tuple of numbers such as (20, 30)"),
        ("optimizer.decay_epochs", ("a",), "a tuple of numbers such as (20, 30)"),
        ("model", 3, "a group of settings"),
    ],
)
def test_a_wrong_type_is_said_with_the_right_one(key, value, right):
    message = _error(key, value)
    assert f"config.{key} must be {right}" in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("sampler.num_steps", -1, "at least 1"),
        ("sampler.num_steps", 0, "at least 1"),
        ("training.batch_size", 0, "at least 1"),
        ("training.epochs", 0, "at least 1"),
        ("training.keep_checkpoints", 1, "at least 2"),
        ("evaluation.num_samples", 0, "at least 1"),
        ("sampler.reinit_prob", 1.5, "at least 0 and at most 1"),
        ("sampler.step_size", 0.0, "above 0"),
        ("optimizer.learning_rate", 0, "above 0"),
        ("optimizer.learning_rate", -1e-4, "above 0"),
        ("optimizer.decay_epochs", (3, 0), "above 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**31, "at least 0 and at most 2"),
        ("training.cpu_devices", -1, "at least 0"),
    ],
)
def test_a_value_out_of_range_is_said_with_the_range(key, value, right):
    assert f"config.{key} must be {right}" in _error(key, value)


@pytest.mark.parametrize(
    "key",
    ["optimizer.learning_rate", "sampler.noise_std", "training.max_log_density", "objective.p_x", "data.input_noise"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(key, value):
    assert f"not {value}" in _error(key, value)


def test_no_number_may_be_nan():
    for key in _keys(configuration.as_dict(Config())):
        default = _default(key)
        if isinstance(default, int | float | tuple) and not isinstance(default, bool):
            nan = (float("nan"),) if isinstance(default, tuple) else float("nan")
            assert f"config.{key} must be" in _error(key, nan)


def _default(key):
    value = Config()
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("key", ["model.norm", "model.dtype", "optimizer.name", "data.pad_mode", "data.place"])
def test_a_wrong_choice_is_said_with_the_choices(key):
    message = _error(key, "bogus")
    right, given = message.split("; ")
    assert right.startswith(f"config.{key} must be one of ")
    assert _default(key) in right
    assert given == "not 'bogus'"


@pytest.mark.parametrize("depth", [11, 12, 27, 29])
def test_a_depth_that_no_wide_resnet_has_is_refused(depth):
    assert f"config.model.depth must be 6n + 4 (10, 16, 22, 28, …), not {depth}" in _error("model.depth", depth)


def test_a_network_of_ones_own_has_no_depth_to_be_wrong():
    assert configuration.validate({"model": {"depth": 11, "factory": "some.module:network"}}).model.depth == 11


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="every weight is 0"):
        configuration.validate({"objective": {"p_x": 0, "p_y_given_x": 0}})
    with pytest.raises(UserError, match=r"sampler\.buffer_size 32 is smaller than config\.training\.batch_size 64"):
        configuration.validate({"sampler": {"buffer_size": 32}, "training": {"batch_size": 64}})


def test_a_plain_classifier_needs_no_buffer():
    config = configuration.validate({"sampler": {"buffer_size": 1}, "objective": {"p_x": 0}})
    assert (config.sampler.buffer_size, config.objective.p_x) == (1, 0)
    with pytest.raises(UserError, match="buffer_size 1 is smaller"):
        configuration.validate({"sampler": {"buffer_size": 1}})


def test_the_description_lists_every_setting_with_default_and_meaning():
    described = list(configuration.describe())
    keys = list(_keys(configuration.as_dict(Config())))
    assert len(described) == len(keys)
    for key, text in zip(keys, described, strict=True):
        first, meaning = text.split("\n")
        assert first == f"  --config.{key}={_default(key)}"
        assert len(meaning.strip()) > 5


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_that_comes_with_the_package_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = configuration.validate(module.get_config())
    assert config != Config()
    assert f"--config=configs/{path.name}" in module.__doc__


@pytest.mark.parametrize("key", ["seed", "sampler.step_size", "optimizer.decay_epochs"])
def test_an_integer_that_no_float_can_be_is_refused(key):
    assert f"config.{key} must be " in _error(key, (10**400,) if key.endswith("epochs") else 10**400)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.norm", "x" * 10_000),
        ("sampler.num_steps", "x" * 10_000),
        ("sampler.num_steps", 1 << 20_000),
        ("optimizer.decay_epochs", ("x" * 100,) * 100),
        ("data", list(range(10_000))),
        ("y" * 10_000, 1),
    ],
    ids=["text", "text for a number", "number", "tuple", "group", "key"],
)
def test_an_overlong_value_is_cut(key, value):
    with pytest.raises(UserError) as caught:
        configuration.validate(_nested(key, value))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("names", [",", "digits,", " , mnist", " "])
def test_a_list_of_sets_with_nothing_between_commas_is_refused(names):
    assert f"config.evaluation.ood_sets must be names separated by commas, not {names!r}" == _error(
        "evaluation.ood_sets", names
    )
