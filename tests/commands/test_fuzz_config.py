"""Any value of any setting is taken or refused in one line, and what is taken runs."""

import dataclasses
import math
import re

import fuzzing
import jax
import pytest
import tiny
from command import finished_run
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from jem_jax import config as configuration
from jem_jax import datasets, report
from jem_jax.commands import config_files
from jem_jax.common.errors import UserError
from jem_jax.config import Config, Data, Evaluation, Model
from jem_jax.datasets import checks
from jem_jax.report import sections
from jem_jax.runs import workdir
from jem_jax.training import network, preflight

FIELDS = {
    f"{group.name}.{field.name}" if dataclasses.is_dataclass(group.type) else group.name: field
    for group in dataclasses.fields(Config)
    for field in (dataclasses.fields(group.type) if dataclasses.is_dataclass(group.type) else (group,))
}

numbers = st.one_of(
    st.integers(),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from([5e-324, 1e-300, 1e38, 1e39, math.inf, -math.inf, math.nan, -0.0]),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.binary(max_size=5), st.complex_numbers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=2),
    ),
    max_leaves=4,
)


def _edges(field):
    """The least and the greatest value that a number may have, what is next to them, and words that it may be."""
    ends = [field.metadata[name] for name in ("low", "above", "high") if field.metadata[name] is not None]
    whole = isinstance(field.default, int)
    near = [end + step for end in ends for step in ((-1, 0, 1) if whole else (-1e-6, 0.0, 1e-6))]
    values = [*near, *field.metadata["choices"], field.default]
    return [(value,) for value in values] if isinstance(field.default, tuple) else values


@st.composite
def _changes(draw):
    key = draw(st.sampled_from(sorted(FIELDS)))
    return key, draw(st.one_of(st.sampled_from(_edges(FIELDS[key])), numbers, anything))


def _in_a_line(error):
    said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 1000
    return said


def _taken_or_refused(function, *arguments):
    """What the function gives, or None where it refused in one line that is not too long."""
    try:
        return function(*arguments)
    except UserError as error:
        _in_a_line(error)
    return None


@fuzzing.examples(100)
@given(_changes())
def test_any_value_is_a_setting_or_refused_in_one_line(change):
    key, value = change
    config = _taken_or_refused(configuration.validate, traverse_util.unflatten_dict({key: value}, sep="."))
    if config is not None:
        assert configuration.validate(configuration.as_dict(config)) == config
        for part in key.split("."):
            config = getattr(config, part)
        assert config == (tuple(value) if isinstance(value, list) else value)
        assert type(config) is type(FIELDS[key].default)


@fuzzing.examples(25)
@given(st.recursive(anything, lambda inner: st.dictionaries(st.sampled_from(sorted(vars(Config()))), inner)))
def test_any_object_is_settings_or_refused_in_one_line(settings):
    config = _taken_or_refused(configuration.validate, settings)
    assert config is None or configuration.validate(configuration.as_dict(config)) == config


keys = st.one_of(
    st.sampled_from(sorted(FIELDS)),
    st.text(max_size=10),
    st.sampled_from(["data", "data.", ".seed", "data.items", "seed.low", "model.__class__", "data.name.x", "_fields"]),
)
texts = st.one_of(
    st.text(max_size=30),
    anything.map(str),
    st.sampled_from(["(" * 500, "0x" + "f" * 5000, "9" * 5000, "{}", "{'.': 1}"]),
)


@fuzzing.examples(100)
@given(keys, texts)
def test_any_text_of_the_command_line_is_a_setting_or_refused_in_one_line(key, text):
    found = _taken_or_refused(config_files.read, "digits", [(key, text)])
    assert found is None or key in FIELDS


names = st.one_of(
    st.text(max_size=20),
    st.text(alphabet="/~.:,npz \0\ud800", max_size=12),
    st.text(alphabet="ab/.", min_size=250, max_size=300),
)


@fuzzing.examples(50)
@given(names)
def test_any_name_is_refused_in_one_line(tmp_path_factory, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        patch.setattr(checks, "memory", lambda: 2**20)
        assert _taken_or_refused(datasets.load, Data(name=name)) is None
        assert _taken_or_refused(network.build, Model(factory=name or ":"), 3) is None
        _taken_or_refused(report.check, Evaluation(sections=name))


# What settings at the ends of their ranges do to a run of two iterations: several at a time, since each run is a
# compilation. A WRN's own settings compile for long.
RUNNING = sorted(key for key in FIELDS if not key.startswith(("evaluation.", "model.")))
# Two by two: of all weights of the objective together, none would be above 0.
PARTS = [[key for place, key in enumerate(RUNNING) if place // 2 % 2 == part] for part in range(2)]
# Attacks through refinement compile for ten seconds.
MEASURED = sorted(
    key for key in FIELDS if key.startswith("evaluation.") and not key.endswith((".sections", ".refined_linf"))
)
SECTIONS = "calibration,ood,samples,sample_quality,inpainting"
"""those that a number changes, but for the attacks, which compile for long"""
# More of it would be a longer test of the same program.
MOST = {
    "sampler.num_steps": 100,
    "sampler.unroll": 5,
    "evaluation.sample_steps": 5,
    "evaluation.num_samples": 20,
    "evaluation.ood_images": 20,
    "evaluation.attack_steps": 2,
    "evaluation.attack_restarts": 2,
}


def _ends(key):
    """A setting's least and greatest value."""
    field = FIELDS[key]
    low, above, high = (field.metadata[name] for name in ("low", "above", "high"))
    if isinstance(field.default, bool):
        return False, True
    if isinstance(field.default, str):
        choices = field.metadata["choices"] or ("",)
        return choices[0], choices[-1]
    least = low if low is not None else math.nextafter(above, math.inf)
    ends = least, type(least)(min(MOST.get(key, math.inf), high))
    return tuple((end,) for end in ends) if isinstance(field.default, tuple) else ends


def _done(keys, end, function):
    """What the function gives for these settings at one of their ends, without those that a refusal names."""
    changes = {key: _ends(key)[end] for key in keys}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "memory", lambda: 2**30)
        while True:
            try:
                return function(changes)
            except UserError as error:
                said = _in_a_line(error)
            named = [key for key in changes if re.search(rf"\b{re.escape(key)}\b", said)]
            assert named, said
            changes = {key: value for key, value in changes.items() if key not in named}


@pytest.mark.parametrize("end", [0, 1], ids=["least", "greatest"])
@pytest.mark.parametrize("part", range(len(PARTS)))
def test_the_ends_of_all_ranges_run(part, end):
    def two_iterations(changes):
        # A buffer that suits any number of classes and devices that the others may ask for.
        rest = {"model.factory": "tiny:mlp", "sampler.buffer_size": 24}
        config, dataset = tiny.config(**{**rest, **changes}), tiny.dataset()
        preflight.check(config, dataset)
        preflight.check_memory(config, dataset, trains=True, sections=())
        start = tiny.start(config)
        state, buffer = start.state, start.buffer
        for number in range(2):
            state, buffer = start.step(state, buffer, start.data.at(number))
        start.data.close()
        return int(jax.device_get(state.step))

    assert _done(PARTS[part], end, two_iterations) == 2


@pytest.mark.parametrize(("end", "more"), [(0, ""), (1, ",adversarial")], ids=["least", "greatest"])
def test_the_ends_of_all_ranges_are_measured(tmp_path, end, more):
    facts = workdir.read_facts(finished_run())
    dataset = datasets.load(facts.config.data)

    def failures(changes):
        evaluation = {key.removeprefix("evaluation."): value for key, value in changes.items()}
        evaluation |= {"sections": SECTIONS + more, "refined_linf": ()}
        config = configuration.validate({**configuration.as_dict(facts.config), "evaluation": evaluation})
        names = [section.name for section in sections.wanted(config.evaluation)]
        preflight.check_memory(config, dataset, trains=False, sections=names)
        changed = dataclasses.replace(facts, config=config)
        return report.write(finished_run(), changed, dataset, {}, lambda _: None, tmp_path).failures

    assert _done(MEASURED, end, failures) == {}
