"""Settings: what is right is taken, what is wrong is said in one line that names the key."""

import dataclasses
import runpy
from pathlib import Path

import ml_collections
import pytest
from flax import traverse_util

from jem_jax import config as configuration
from jem_jax.common.errors import UserError
from jem_jax.config import Config

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.stem != "__init__")


def _error(key, value):
    with pytest.raises(UserError) as caught:
        configuration.validate(traverse_util.unflatten_dict({key: value}, sep="."))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_dict_and_nested_dicts_become_the_same_frozen_settings():
    assert configuration.validate(configuration.default()) == configuration.validate({}) == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3
    # An integer is a float where a float is wanted.
    nested = {"sampler": {"num_steps": 40}, "optimizer": {"decay_epochs": [20, 30.5]}, "seed": 3}
    override = configuration.default()
    override.sampler.num_steps = 40
    override.optimizer.decay_epochs = (20.0, 30.5)
    override.seed = 3
    optimizer = configuration.Optimizer(decay_epochs=(20.0, 30.5))
    expected = Config(sampler=configuration.Sampler(num_steps=40), optimizer=optimizer, seed=3)
    for settings in (nested, ml_collections.ConfigDict(nested), override, configuration.as_dict(expected)):
        assert configuration.validate(settings) == expected


# Each setting that is refused, and what the error says of it after "config.KEY ".
REFUSED = [
    ("model.xyzzy", 1, "is not a setting; there are: factory, depth, width"),
    ("num_steps", 1, "is not a setting; did you mean config.sampler.num_steps?"),
    ("nonsense", 1, "is not a setting; there are: data, model, sampler"),
    ("sampler.num_steps", 2.5, "must be of type int, not 2.5"),
    ("sampler.num_steps", True, "must be of type int, not True"),
    ("sampler.clip_x", 1, "must be of type bool, not 1"),
    ("optimizer.decay_epochs", 20, "must be a tuple of numbers such as (20, 30), not 20"),
    ("evaluation.attack_linf", "a", "must be a tuple of numbers such as (0.004, 0.008), not 'a'"),
    ("model", 3, "must be a group of settings, not 3"),
    ("sampler.num_steps", 0, "must be at least 1 and at most 100000, not 0"),
    ("optimizer.decay_epochs", (3, 0), "must be above 0"),
    ("sampler.noise_std", float("nan"), "must be at least 0"),
    ("evaluation.attack_linf", (0.1, float("nan")), "must be above 0"),
    ("optimizer.learning_rate", float("inf"), "must be above 0 and at most 100, not inf"),
    ("sampler.step_size", 10**400, "must be of type float"),
    ("model.norm", "bogus", "must be one of none, batch, instance, layer, act; not 'bogus'"),
    ("model.depth", 11, "must be 6n + 4 (10, 16, 22, 28, …), not 11"),
    *[("evaluation.ood_sets", names, f"must be names separated by commas, not {names!r}") for names in
      ("digits,", " , mnist", " ")],
    ("sampler.buffer_size", 32, "32 is smaller than config.training.batch_size 64"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "said"), REFUSED)
def test_a_wrong_setting_is_refused(key, value, said):
    assert _error(key, value).startswith(f"config.{key} {said}")


def test_no_number_may_be_nan():
    for key, default in traverse_util.flatten_dict(configuration.as_dict(Config()), sep=".").items():
        if isinstance(default, int | float | tuple) and not isinstance(default, bool):
            nan = (float("nan"),) if isinstance(default, tuple) else float("nan")
            assert f"config.{key} must be" in _error(key, nan)


def test_settings_that_do_not_matter_may_be_wrong_and_some_weight_must_be_above_0():
    assert configuration.validate({"model": {"depth": 11, "factory": "some.module:network"}}).model.depth == 11
    config = configuration.validate({"sampler": {"buffer_size": 1}, "objective": {"p_x": 0}})
    assert (config.sampler.buffer_size, config.objective.p_x) == (1, 0)
    with pytest.raises(UserError, match="every weight is 0"):
        configuration.validate({"objective": {"p_x": 0, "p_y_given_x": 0}})


def test_the_description_lists_every_setting_with_default_and_meaning():
    defaults = traverse_util.flatten_dict(configuration.as_dict(Config()), sep=".")
    for (key, default), text in zip(defaults.items(), configuration.describe(), strict=True):
        first, meaning = text.split("\n")
        assert first == f"  --config.{key}={default}"
        assert len(meaning.strip()) > 5


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_that_comes_with_the_package_is_valid(path):
    module = runpy.run_path(path)
    assert configuration.validate(module["get_config"]()) != Config()
    assert f"--config=configs/{path.name}" in module["__doc__"]


def test_removed_settings_of_an_earlier_version_are_left_out():
    written = configuration.as_dict(Config(seed=3))
    written["recovery"]["proof"] = 50
    assert configuration.stored(written) == Config(seed=3)
    written["model"]["proof"] = 50
    with pytest.raises(UserError, match=r"config\.model\.proof is not a setting"):
        configuration.stored(written)
