"""A whole iteration with SAM, against two passes written out."""

import jax
import numpy as np
import pytest
import tiny

from jem_jax import sam
from jem_jax.augment import to_float
from jem_jax.datasets.batches import Stream


def test_an_iteration_samples_by_batch_statistics_and_takes_the_second_gradient_with_the_same_negatives():
    config = tiny.config(
        **{
            "model.factory": "tiny:plain_batch_norm_mlp",
            "data.pad": 0,
            "data.input_noise": 0.0,
            "sampler.noise_std": 0.0,
            "sampler.reinit_prob": 0.0,
            "sampler.batch_statistics": True,
            "optimizer.sam_rho": 0.5,
            "optimizer.sam_adaptive": True,
            "optimizer.weight_decay": 0.1,
            "training.labelled_batch_size": 16,
            "seed": 3,
        }
    )
    start = tiny.start(config)
    state, buffer = start.step(start.state, start.buffer, start.data.at(0))
    new, old = tiny.whole(buffer), start.chains
    slots = np.flatnonzero(np.any(new != old, axis=(1, 2, 3, 4)))
    assert len(slots) == 8
    negatives = new[slots, 0]
    images = tiny.dataset().train
    rows, labelled_rows = (
        Stream(config.seed, stream, len(images), size).order(0)[:size] for stream, size in ((0, 8), (1, 16))
    )
    assert start.data.at(0).labelled_order.shape == (32,)
    data, labelled = (to_float(images.images[chosen]) for chosen in (rows, labelled_rows))
    labels = images.labels[labelled_rows]
    variables = jax.device_get({**start.state.model_state, "params": start.state.params})

    # The chains' density is that of a device's own chains together, whose statistics it takes.
    @jax.jit
    @jax.grad
    def score(x):
        return jax.scipy.special.logsumexp(start.network.batch_logits(variables, x, jax.random.key(0)), axis=1).sum()

    for device in range(4):
        x = old[slots[2 * device : 2 * device + 2], 0]
        for _ in range(config.sampler.num_steps):
            x = x + config.sampler.step_size * np.array(score(x))
        np.testing.assert_allclose(negatives[2 * device : 2 * device + 2], x, rtol=1e-4, atol=1e-5)

    def loss(params):
        """The mean over the devices, each of which normalises its own part."""

        def part(labelled, labels, negatives, data):
            inputs = [labelled, negatives, data]
            logits, statistics = start.network.train_logits({**variables, "params": params}, inputs, jax.random.key(0))
            log_px = [jax.scipy.special.logsumexp(each, axis=1).mean() for each in logits[1:]]
            picked = jax.nn.log_softmax(logits[0])[np.arange(4), labels]
            return log_px[0] - log_px[1] - picked.mean(), statistics

        split = [np.stack(np.split(batch, 4)) for batch in (labelled, labels, negatives, data)]
        parts, statistics = jax.vmap(part)(*split)
        return parts.mean(), jax.tree.map(lambda leaf: leaf.mean(axis=0), statistics)

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, statistics), gradients = value_and_grad(variables["params"])
    climbed = sam.ascend(variables["params"], gradients, 0.5, adaptive=True)
    second = value_and_grad(climbed)[1]
    assert float(state.window.sums["loss"]) == pytest.approx(float(value), rel=1e-4)
    # The penalty is that of the weights that move, not of those climbed to.
    moved = jax.tree.map(lambda w, g: w - 0.05 * (g + 0.1 * w), variables["params"], second)
    for name, expected in tiny.leaves(moved).items():
        np.testing.assert_allclose(tiny.leaves(state.params)[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    plain = jax.tree.map(lambda w, g: w - 0.05 * (g + 0.1 * w), variables["params"], gradients)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True)) > 1e-4
    for name, expected in tiny.leaves(statistics).items():
        np.testing.assert_allclose(tiny.leaves(state.model_state)[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
