"""Adversarial attacks against closed forms, and what must hold of any attack and defence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jem_jax import replay_buffer
from jem_jax.evaluation import adversarial, distal

COUNT, SHAPE = 24, (3, 3, 1)
KEYS = jax.random.split(jax.random.key(0), COUNT)
RANDOM = np.random.default_rng(1)
FIRST, SECOND = (RANDOM.normal(size=size).astype(np.float32) for size in ((9, 16), (16, 4)))
IMAGES = RANDOM.uniform(-1, 1, (COUNT, *SHAPE)).astype(np.float32)
PLANE = RANDOM.normal(size=9).astype(np.float32)
# Well inside [-1, 1], so that no attack of the plane meets the walls.
INNER = RANDOM.uniform(-0.4, 0.4, (COUNT, *SHAPE)).astype(np.float32)
WRONG = np.arange(COUNT) % 4 == 0
"""images whose labels the network does not give"""


def _linear(x):
    """Two classes apart by a plane: f(x) = (0, w·x + 0.1)."""
    score = x.reshape(len(x), -1) @ PLANE + 0.1
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


@jax.jit
def _mlp(x):
    """A network whose loss is not linear."""
    return jnp.tanh(x.reshape(len(x), -1) @ FIRST) @ SECOND


LABELS = ((np.tanh(IMAGES.reshape(COUNT, -1) @ FIRST) @ SECOND).argmax(axis=-1) + WRONG).astype(np.int32) % 4
_pgd = jax.jit(adversarial.pgd, static_argnames=("classifier", "norm", "restarts", "until_all_fall"))


def _plain(keys, x):
    return _mlp(x)


def _plane(keys, x):
    return _linear(x)


def _attack(epsilon, images=IMAGES, labels=LABELS, classifier=_plain, num_steps=10, **how):
    """The strongest points, and their margins."""
    how = {"norm": "linf", **how}
    return map(np.asarray, _pgd(jax.random.key(0), classifier, images, labels, epsilon, num_steps=num_steps, **how))


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_plane_is_attacked_as_strongly_as_can_be_within_the_ball_and_among_the_pixels(norm, dual):
    score = INNER.reshape(COUNT, -1) @ PLANE + 0.1
    labels = (score > 0).astype(np.int32)
    _, margins = _attack(0.05, INNER, labels, _plane, 60, norm=norm)
    # The largest change of w·x within the ball is its radius (of [-1, 1] values) times the dual norm of w.
    strongest = np.abs(score) - 2 * 0.05 * np.linalg.norm(PLANE, dual)
    np.testing.assert_allclose(margins, -strongest, rtol=1e-4, atol=1e-4)
    assert 0 < np.mean(strongest > 0) < 1
    points, _ = _attack(0.3, IMAGES, labels, _plane, norm=norm)
    change = (points - IMAGES).reshape(COUNT, -1)
    assert np.linalg.norm(change, {"linf": np.inf, "l2": 2}[norm], axis=1).max() <= 2 * 0.3 * (1 + 1e-5)
    assert np.abs(points).max() <= 1


def test_more_steps_or_restarts_are_never_weaker_and_no_attack_leaves_what_was_wrong():
    (_, few), (_, more), (_, restarted) = (_attack(0.05, num_steps=n, restarts=r) for n, r in ((1, 1), (8, 1), (1, 2)))
    for stronger in (more, restarted):
        assert (stronger >= few - 1e-5).all()
        assert stronger.mean() > few.mean()
    points, margins = _attack(0.0)
    np.testing.assert_array_equal(points, IMAGES)
    np.testing.assert_array_equal(margins > 0, WRONG)


def test_an_attack_may_end_when_all_images_have_fallen():
    whole, short = ([*_attack(0.1, restarts=2, until_all_fall=ends)] for ends in (False, True))
    # One image that stands keeps all of the batch under attack.
    assert not (whole[1] > 0).all()
    np.testing.assert_array_equal(short[0], whole[0])
    rows = np.resize(np.flatnonzero(whole[1] > 0), COUNT)
    (_, margins), (_, strongest) = (
        _attack(0.3, IMAGES[rows], LABELS[rows], restarts=2, until_all_fall=ends) for ends in (True, False)
    )
    assert (margins > 0).all()
    assert (margins < strongest).all()
    # Nothing is left to do where every label was wrong from the start.
    rows = np.resize(np.flatnonzero(WRONG), COUNT)
    points, _ = _attack(0.3, IMAGES[rows], LABELS[rows], restarts=2, until_all_fall=True)
    np.testing.assert_array_equal(points, IMAGES[rows])


def test_the_margin_is_that_of_the_best_wrong_class_and_nan_is_a_mistake():
    logits = np.array([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [1.0, np.nan, 0.0], [np.nan, 1.0, 0.0]])
    margins = jax.jit(adversarial.margin)(logits, np.array([1, 2, 0, 0]))
    np.testing.assert_array_equal(margins, [-2, 2, np.inf, np.inf])
    assert np.isposinf([*_attack(0.1, classifier=lambda keys, x: np.nan * x.reshape(COUNT, -1))][1]).all()


def test_an_unknown_norm_is_an_error():
    with pytest.raises(ValueError, match="linf, l2"):
        _attack(0.1, norm="l1")


def test_every_image_may_be_attacked_in_a_ball_of_its_own():
    sizes, labels = np.where(np.arange(COUNT) < 5, 0.05, 0.2), np.arange(COUNT, dtype=np.int32) % 2
    each, *rest = (next(_attack(size, IMAGES, labels, _plane, 3, norm="l2")) for size in (sizes, 0.05, 0.2))
    np.testing.assert_allclose(each, np.where((sizes < 0.1)[:, None, None, None], *rest), atol=1e-5)


def test_refinement_averages_logits_over_its_noisy_copies():
    images, how = IMAGES[:2], {"num_steps": 0, "input_noise": 0.2, "copies": 4000}
    found = jax.jit(lambda: adversarial.refined(KEYS[:2], _mlp, images, **how))()
    noise = np.random.default_rng(0).normal(0, 0.2, (20_000, *SHAPE)).astype(np.float32)
    expected = np.stack([np.asarray(_mlp(image + noise)).mean(axis=0) for image in images])
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert np.abs(expected - np.asarray(_mlp(images))).max() > 0.3


def _density(x):
    return jax.scipy.special.logsumexp(_mlp(x), axis=-1).sum()


def test_refinement_follows_the_gradient_of_the_log_density():
    clips = {"grad_clip": 0.1, "bounds": (-0.9, 0.9)}
    how = {"num_steps": 2, "step_size": 0.1, "noise_std": 0.0, "input_noise": 0.0, "copies": 2, **clips}

    @jax.jit
    def both(x):
        found = adversarial.refined(KEYS, _mlp, x, **how)
        for _ in range(2):
            x = jnp.clip(x + 0.1 * jnp.clip(jax.grad(_density)(x), -0.1, 0.1), -0.9, 0.9)
        return found, _mlp(x)

    np.testing.assert_allclose(*both(IMAGES), rtol=1e-4, atol=1e-4)


def test_the_official_gradient_is_that_at_the_chains_end_and_the_stronger_one_goes_through_it():
    how = {"num_steps": 2, "step_size": 0.1, "noise_std": 0.0, "input_noise": 0.0, "copies": 1}
    target = np.eye(4)[LABELS]

    def through(x):
        for _ in range(2):
            x = x + 0.1 * jax.grad(_density)(x)
        return x

    @jax.jit
    def gradients(x):
        of = lambda logits_fn, x: jax.grad(lambda x: (target * logits_fn(x)).sum())(x)  # noqa: E731
        expected = of(_mlp, through(x)), of(lambda x: _mlp(through(x)), x)
        defence = functools.partial(adversarial.refined, KEYS, _mlp, **how)
        return expected, tuple(of(functools.partial(defence, backpropagate=through), x) for through in (False, True))

    (at_end, whole), found = gradients(IMAGES)
    np.testing.assert_allclose(found, (at_end, whole), rtol=1e-4, atol=1e-4)
    assert np.abs(at_end - whole).max() > 0.1


def test_a_defence_with_noise_is_weaker_under_the_noise_that_the_attack_saw():
    def noisy(keys, x):
        return _mlp(x + 0.3 * jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys))

    points, seen = _attack(0.05, classifier=noisy)
    logits = jax.jit(noisy)(jax.random.split(jax.random.key(1), COUNT), points)
    # It kept what was worst under the noise that it saw, and some of that is right under other noise.
    assert np.mean(adversarial.margin(logits, LABELS) < 0) > np.mean(seen < 0)


def test_noise_climbs_to_the_wanted_class():
    classes = np.repeat(np.array([0, 1], np.int32), 6)
    start = replay_buffer.uniform(jax.random.key(0), 12, SHAPE)
    how = {"confidence": 0.9, "max_steps": 50, "step_length": 0.1}
    found = jax.tree.map(np.asarray, jax.jit(lambda: distal.ascend(_linear, start, classes, **how))())
    logits = np.asarray(_linear(found.images))
    posterior = np.exp(logits)[np.arange(12), classes] / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose(found.confidence, posterior, rtol=1e-5)
    assert (found.confidence >= 0.9).all()
    assert np.abs(found.images).max() <= 1
    # It stops where it gets there: one step of 0.1 along w moves the score by at most 0.1 |w|.
    assert (np.abs(logits[:, 1]) <= np.log(9) + 0.1 * np.linalg.norm(PLANE) + 1e-4)[found.steps > 0].all()


def test_a_climb_that_does_not_get_there_has_taken_all_steps():
    flat = lambda x: jnp.zeros((len(x), 3)) + 0 * x.sum()  # noqa: E731
    found = jax.jit(lambda x: distal.ascend(flat, x, np.zeros(4, int), max_steps=7))(IMAGES[:4])
    assert (found.steps == 7).all()
    np.testing.assert_allclose(found.confidence, 1 / 3, rtol=1e-6)
