"""What the start-up line says of an iteration's arithmetic."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from jem_jax import config as configuration
from jem_jax.training import forecast, network
from jem_jax.training.schedule import Program


def _by_hand(side):
    """Multiply-adds of a WRN-10-1's forward pass of one grey image, layer by layer."""
    total, channels = side * side * 9 * 16, 16
    for stage, features in enumerate((16, 32, 64)):
        total += side * side * 9 * channels * features
        if stage:
            side //= 2
            total += side * side * channels * features
        total += side * side * 9 * features * features
        channels = features
    return total + 64 * 10


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_an_iterations_arithmetic_is_that_of_its_convolutions_on_every_backend(monkeypatch, backend):
    config = configuration.validate({"sampler": {"num_steps": 5}, "training": {"batch_size": 32}})
    net = network.build(config.model, 10)
    variables = jax.eval_shape(lambda key: net.init(key, jnp.zeros((1, 8, 8, 1))), jax.random.key(0))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found = forecast.flops_per_iteration(
        config, net, variables, (8, 8, 1), Program(needs_samples=True, num_steps=5, sam=False, frozen=False)
    )
    # A chain step is a pass and an input gradient; a batch of the loss has a weight gradient besides.
    assert found == 2 * _by_hand(8) * 32 * (5 * 2 + 3 * 3)


def test_a_network_of_ones_own_counts_its_products():
    net = network.Network(tiny.mlp(3))
    variables = jax.eval_shape(lambda key: net.init(key, jnp.zeros((1, 8, 8, 1))), jax.random.key(0))
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables) if leaf.ndim == 2)
    config = configuration.validate({"objective": {"p_x": 0.0}, "training": {"batch_size": 8}})
    program = Program(needs_samples=False, num_steps=0, sam=False, frozen=False)
    assert forecast.flops_per_iteration(config, net, variables, (8, 8, 1), program) == 2 * weights * 3 * 8
