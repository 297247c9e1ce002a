"""Adversarial attacks against closed forms, and what must hold of any attack and defence."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jem_jax import replay_buffer
from jem_jax.evaluation import adversarial, distal

SHAPE = (3, 3, 1)
COUNT = 24


def _linear(weights, x):
    """Two classes apart by a plane: f(x) = (0, w·x + b)."""
    score = x.reshape(len(x), -1) @ weights["w"] + weights["b"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def _mlp(weights, x):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ weights["first"])
    return hidden @ weights["second"]


@pytest.fixture(scope="module")
def plane():
    """Images well inside [-1, 1], so that no attack meets the walls, and the class that each has."""
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=9).astype(np.float32), "b": np.float32(0.1)}
    images = random.uniform(-0.4, 0.4, (COUNT, *SHAPE)).astype(np.float32)
    labels = np.asarray(_linear(weights, images).argmax(axis=-1), np.int32)
    return weights, images, labels


@pytest.fixture(scope="module")
def curved():
    """A network whose loss is not linear, with the labels that it gives, three in four of them right."""
    random = np.random.default_rng(1)
    weights = {name: random.normal(size=size).astype(np.float32) for name, size in
               (("first", (9, 16)), ("second", (16, 4)))}  # fmt: skip
    images = random.uniform(-1, 1, (COUNT, *SHAPE)).astype(np.float32)
    labels = np.array(_mlp(weights, images).argmax(axis=-1), np.int32)
    labels[::4] = (labels[::4] + 1) % 4
    return weights, images, labels


def _attack(classifier, case, epsilon, norm="linf", num_steps=10, restarts=1):
    """The strongest points, and whether each is still classified as its label under fresh noise."""
    weights, images, labels = case
    run = jax.jit(functools.partial(adversarial.pgd, norm=norm, num_steps=num_steps, restarts=restarts),
                  static_argnums=1)  # fmt: skip
    attack_key, judge_key = jax.random.split(jax.random.key(0))
    points, _ = run(attack_key, functools.partial(classifier, weights), images, labels, epsilon)
    logits = classifier(weights, jax.random.split(judge_key, COUNT), points)
    return types.SimpleNamespace(images=np.asarray(points), right=np.asarray(adversarial.margin(logits, labels) < 0))


def _plain(logits_fn):
    return lambda weights, keys, x: logits_fn(weights, x)


def _refined(**how):
    return lambda weights, keys, x: adversarial.refined(keys, lambda x: _mlp(weights, x), x, **how)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_plane_is_attacked_as_strongly_as_can_be(plane, norm, dual):
    weights, images, labels = plane
    defence = _plain(_linear)
    epsilon = 0.05
    found = _attack(defence, plane, epsilon, norm, num_steps=60)
    sign = 2 * labels - 1
    score = np.asarray(_linear(weights, images))[:, 1] * sign
    # The largest change of w·x within the ball is its radius (of [-1, 1] values) times the dual norm of w.
    strongest = score - 2 * epsilon * np.linalg.norm(weights["w"], dual)
    np.testing.assert_allclose(np.asarray(_linear(weights, found.images))[:, 1] * sign, strongest, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.right, strongest > 0)
    assert 0 < found.right.mean() < 1


@pytest.mark.parametrize("norm", adversarial.NORMS)
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_attacked_images_stay_in_the_ball_and_among_the_pixels(curved, norm, epsilon):
    _, images, _ = curved
    found = _attack(_plain(_mlp), curved, epsilon, norm)
    change = (found.images - images).reshape(COUNT, -1)
    size = np.abs(change).max(axis=1) if norm == "linf" else np.linalg.norm(change, axis=1)
    assert size.max() <= 2 * epsilon * (1 + 1e-5)
    assert np.abs(found.images).max() <= 1


def test_no_attack_leaves_the_images_and_what_was_wrong(curved):
    _, images, _ = curved
    found = _attack(_plain(_mlp), curved, 0.0)
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.right, np.arange(COUNT) % 4 != 0)


def test_more_steps_or_restarts_are_never_weaker(curved):
    weights, _, labels = curved

    def margins(**how) -> np.ndarray:
        found = _attack(_plain(_mlp), curved, 0.05, **how)
        return np.asarray(adversarial.margin(_mlp(weights, found.images), labels))

    few, more, restarted = margins(num_steps=1), margins(num_steps=8), margins(num_steps=1, restarts=6)
    assert (more >= few - 1e-5).all()
    assert (restarted >= few - 1e-5).all()
    assert more.mean() > few.mean()
    assert restarted.mean() > few.mean()


@pytest.mark.parametrize("restarts", [1, 2])
def test_an_attack_may_end_when_all_images_have_fallen(curved, restarts):
    weights, images, labels = curved
    attack = functools.partial(
        adversarial.pgd, jax.random.key(0), lambda _, x: _mlp(weights, x), norm="linf", num_steps=20, restarts=restarts
    )
    whole, short = (attack(jnp.asarray(images), labels, 0.1, until_all_fall=ends) for ends in (False, True))
    # One image that stands keeps all of the batch under attack.
    assert not (whole[1] > 0).all()
    np.testing.assert_array_equal(short[0], whole[0])
    rows = np.flatnonzero(whole[1] > 0)
    points, margins = attack(jnp.asarray(images[rows]), labels[rows], 0.3, until_all_fall=True)
    strongest = attack(jnp.asarray(images[rows]), labels[rows], 0.3)[1]
    assert (margins > 0).all()
    assert (margins < strongest).all()
    # Every fourth label was wrong from the start, where nothing is left to do.
    points, _ = attack(jnp.asarray(images[::4]), labels[::4], 0.3, until_all_fall=True)
    np.testing.assert_array_equal(points, images[::4])


def test_nan_is_a_mistake(curved):
    weights, images, labels = curved
    broken = {**weights, "second": weights["second"] * np.nan}
    found = _attack(_plain(_mlp), (broken, images, labels), 0.1)
    assert not found.right.any()
    assert np.isposinf(adversarial.margin(jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]]), jnp.array([0, 0]))).all()


def test_the_margin_is_that_of_the_best_wrong_class():
    logits = jnp.array([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    np.testing.assert_array_equal(adversarial.margin(logits, jnp.array([1, 2])), [-2, 2])


def test_an_unknown_norm_is_an_error(curved):
    with pytest.raises(ValueError, match="linf, l2"):
        _attack(_plain(_mlp), curved, 0.1, norm="l1")


def test_one_vmapped_attack_of_several_sizes_is_those_attacks(curved):
    weights, images, labels = curved
    attack = functools.partial(adversarial.pgd, norm="l2", num_steps=3)
    one = lambda epsilon: attack(  # noqa: E731
        jax.random.key(0), lambda _, x: _mlp(weights, x), jnp.asarray(images), labels, epsilon
    )
    several = jax.jit(jax.vmap(one))(jnp.array([0.05, 0.2]))
    for i, epsilon in enumerate((0.05, 0.2)):
        np.testing.assert_allclose(several[0][i], one(epsilon)[0], atol=1e-5)
    # Or one size for each example.
    mixed = one(jnp.where(jnp.arange(COUNT) < 5, 0.05, 0.2))
    np.testing.assert_allclose(mixed[0][:5], several[0][0, :5], atol=1e-5)
    np.testing.assert_allclose(mixed[0][5:], several[0][1, 5:], atol=1e-5)


def test_refinement_averages_logits_over_its_noisy_copies(curved):
    weights, images, _ = curved
    many = _refined(num_steps=0, input_noise=0.2, copies=4000)
    keys = jax.random.split(jax.random.key(0), 2)
    noise = np.random.default_rng(0).normal(0, 0.2, (20_000, *SHAPE)).astype(np.float32)
    expected = np.stack([np.asarray(_mlp(weights, image + noise)).mean(axis=0) for image in images[:2]])
    np.testing.assert_allclose(many(weights, keys, images[:2]), expected, atol=0.15)
    assert np.abs(expected - np.asarray(_mlp(weights, images[:2]))).max() > 0.3


def test_refinement_follows_the_gradient_of_the_log_density(curved):
    weights, images, _ = curved
    clips = {"grad_clip": 0.1, "bounds": (-0.9, 0.9)}
    defence = _refined(num_steps=2, step_size=0.1, noise_std=0.0, input_noise=0.0, copies=2, **clips)
    x = jnp.asarray(images)
    for _ in range(2):
        gradient = jax.grad(lambda x: jax.scipy.special.logsumexp(_mlp(weights, x), axis=-1).sum())(x)
        x = jnp.clip(x + 0.1 * jnp.clip(gradient, -0.1, 0.1), -0.9, 0.9)
    keys = jax.random.split(jax.random.key(0), COUNT)
    np.testing.assert_allclose(defence(weights, keys, images), _mlp(weights, x), rtol=1e-4, atol=1e-4)


def test_the_official_gradient_is_that_at_the_chains_end_and_the_stronger_one_goes_through_it(curved):
    weights, images, labels = curved
    settings = {"num_steps": 2, "step_size": 0.1, "noise_std": 0.0, "input_noise": 0.0, "copies": 1}
    keys = jax.random.split(jax.random.key(0), COUNT)
    target = jax.nn.one_hot(labels, 4)

    def through(x):
        for _ in range(2):
            x = x + 0.1 * jax.grad(lambda x: jax.scipy.special.logsumexp(_mlp(weights, x), axis=-1).sum())(x)
        return x

    at_end = jax.grad(lambda x: (target * _mlp(weights, x)).sum())(through(jnp.asarray(images)))
    whole = jax.grad(lambda x: (target * _mlp(weights, through(x))).sum())(jnp.asarray(images))
    for backpropagate, expected in ((False, at_end), (True, whole)):
        defence = _refined(**settings, backpropagate=backpropagate)
        found = jax.grad(lambda x, defence=defence: (target * defence(weights, keys, x)).sum())(jnp.asarray(images))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(at_end - whole).max() > 0.1


def test_a_defence_with_noise_is_judged_under_noise_that_the_attack_did_not_see(curved):
    noisy = _refined(num_steps=1, step_size=0.1, input_noise=0.3, copies=1)
    one, other = (_attack(noisy, curved, 0.05), _attack(noisy, curved, 0.05))
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.right, other.right)
    # It kept what was worst under the noise that it saw, and some of that is right under other noise.
    weights, images, labels = curved
    attack_key = jax.random.split(jax.random.key(0))[0]
    seen = adversarial.pgd(attack_key, functools.partial(noisy, weights), images, labels, 0.05,
                           norm="linf", num_steps=10)[1]  # fmt: skip
    assert one.right.mean() > (seen < 0).mean()


def test_noise_climbs_to_the_wanted_class():
    weights = {"w": np.random.default_rng(0).normal(size=9).astype(np.float32), "b": np.float32(0)}
    classes = np.repeat(np.array([0, 1], np.int32), 6)
    start = replay_buffer.uniform(jax.random.key(0), 12, SHAPE)
    found = distal.ascend(lambda x: _linear(weights, x), start, classes, confidence=0.9, max_steps=50, step_length=0.1)
    logits = np.asarray(_linear(weights, found.images))
    posterior = np.exp(logits)[np.arange(12), classes] / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose(found.confidence, posterior, rtol=1e-5)
    assert (found.confidence >= 0.9).all()
    assert np.abs(found.images).max() <= 1
    # It stops where it gets there: one step of 0.1 along w moves the score by at most 0.1 |w|.
    assert (np.abs(logits[:, 1]) <= np.log(9) + 0.1 * np.linalg.norm(weights["w"]) + 1e-4)[found.steps > 0].all()


def test_a_climb_that_does_not_get_there_has_taken_all_steps():
    start = jnp.zeros((4, *SHAPE))
    found = distal.ascend(lambda x: jnp.zeros((len(x), 3)) + 0 * x.sum(), start, jnp.zeros(4, int), max_steps=7)
    assert (found.steps == 7).all()
    np.testing.assert_allclose(found.confidence, 1 / 3, rtol=1e-6)
