"""Learning rates and update rules against their formulas, PyTorch's weight decay among them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jem_jax.config import Optimizer
from jem_jax.training import optimizer

STEPS_PER_EPOCH = 10


RATES = {
    "constant by default": ({"learning_rate": 0.25}, {0: 0.25, 10**6: 0.25}),
    "decay at the first iteration of an epoch": (
        {"learning_rate": 1.0, "decay_epochs": (2.0, 3.5), "decay_factor": 0.3},
        {0: 1, 19: 1, 20: 0.3, 34: 0.3, 35: 0.09, 10**5: 0.09},
    ),
    "decay within warm-up multiplies": (
        {"learning_rate": 1.0, "warmup_steps": 20, "decay_epochs": (1.0,), "decay_factor": 0.5},
        {9: 9 / 20, 10: 10 / 20 * 0.5, 20: 0.5},
    ),
    "linear": ({}, {0: 0.1, 50: 0.05, 99: 0.001}),
    "linear after warm-up": ({"warmup_steps": 10}, {5: 0.1 * 0.95 * 0.5}),
    "cosine": ({}, {0: 0.1, 50: 0.05, 99: 0.1 * (1 + np.cos(np.pi * 0.99)) / 2}),
    "one_cycle": (
        {},
        {0: 0.004, 50: 0.05 * (1 + np.cos(np.pi * 2 / 7)), 99: 4e-7 + 0.05 * (1 + np.cos(np.pi * 69 / 70))},
    ),
}
"""{case, by the schedule's name where it is none of steps: (settings, {iteration of 100: rate})}"""


@pytest.mark.parametrize("case", RATES)
def test_learning_rates(case):
    settings, rates = RATES[case]
    shape = next((name for name in ("linear", "cosine", "one_cycle") if case.startswith(name)), "steps")
    schedule = optimizer.schedule(Optimizer(**{"learning_rate": 0.1, **settings}), STEPS_PER_EPOCH, shape, 100)
    found = [schedule(jnp.int32(step)) for step in rates]
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-6, atol=1e-7)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="one of adam, sgd, not 'lion'"):
        optimizer.build(Optimizer(name="lion"), STEPS_PER_EPOCH)


# The last parameter has no gradient: weight decay alone pulls on it.
GRADIENTS = np.random.default_rng(0).normal(size=(6, 5)) * np.array([1e-3, 0.1, 1.0, 10.0, 0.0])
START = np.random.default_rng(1).normal(size=5)


def _rate(settings, step):
    epochs_decayed = sum(step >= epoch * STEPS_PER_EPOCH for epoch in settings.decay_epochs)
    return settings.learning_rate * min(1, step / settings.warmup_steps) * settings.decay_factor**epochs_decayed


def _clipped(settings, gradient):
    """torch.nn.utils.clip_grad_norm_."""
    return gradient * min(1, settings.clip_norm / np.linalg.norm(gradient)) if settings.clip_norm else gradient


def _adam(settings):
    """torch.optim.Adam, its L2 penalty's gradient added before the moments."""
    x, m, v = START.copy(), np.zeros(5), np.zeros(5)
    for step, gradient in enumerate(GRADIENTS):
        g = _clipped(settings, gradient) + settings.weight_decay * x
        m = settings.beta1 * m + (1 - settings.beta1) * g
        v = settings.beta2 * v + (1 - settings.beta2) * g**2
        m_hat, v_hat = m / (1 - settings.beta1 ** (step + 1)), v / (1 - settings.beta2 ** (step + 1))
        x = x - _rate(settings, step) * m_hat / (np.sqrt(v_hat) + 1e-8)
        yield x


def _sgd(settings):
    """torch.optim.SGD with momentum, without dampening."""
    x, velocity = START.copy(), np.zeros(5)
    for step, gradient in enumerate(GRADIENTS):
        velocity = settings.momentum * velocity + _clipped(settings, gradient) + settings.weight_decay * x
        x = x - _rate(settings, step) * velocity
        yield x


@pytest.mark.parametrize(
    ("name", "formula", "weight_decay", "clip_norm"), [("adam", _adam, 0.1, 1.5), ("sgd", _sgd, 0.1, 0.0)]
)
def test_updates_follow_pytorchs_formulas(name, formula, weight_decay, clip_norm):
    settings = Optimizer(
        name=name,
        learning_rate=0.05,
        beta1=0.8,
        beta2=0.95,
        momentum=0.7,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        warmup_steps=2,
        decay_epochs=(0.4,),
    )
    rule = optimizer.build(settings, STEPS_PER_EPOCH)
    params = {"x": jnp.asarray(START, jnp.float32)}
    state = rule.init(params)
    expected = list(formula(settings))
    for gradient, after in zip(GRADIENTS, expected, strict=True):
        updates, state = rule.update({"x": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["x"], after, rtol=2e-5, atol=1e-6)
    assert np.abs(expected[-1] - START).max() > 0.01
