"""Augmentation: what can come out, and how often."""

import functools

import jax
import numpy as np

from jem_jax.augment import augment, random_shift

IMAGE = np.random.default_rng(0).uniform(-0.9, 0.9, (6, 8, 2)).astype(np.float32)
COUNT = 1000


def _many(function):
    """The function on one image with many keys: [COUNT, H, W, C]."""
    return np.array(jax.jit(jax.vmap(lambda key: function(key, IMAGE)))(jax.random.split(jax.random.key(0), COUNT)))


def _crops(pad, mode):
    sides = ((pad, pad), (pad, pad), (0, 0))
    padded = np.pad(IMAGE, sides, "reflect") if mode == "reflect" else np.pad(IMAGE, sides, constant_values=-1)
    places = [(row, column) for row in range(2 * pad + 1) for column in range(2 * pad + 1)]
    return [padded[row : row + IMAGE.shape[0], column : column + IMAGE.shape[1]] for row, column in places]


def test_shifts_are_the_crops_of_the_padded_image_all_equally_often():
    crops = _crops(3, "reflect")
    which = {crop.tobytes(): i for i, crop in enumerate(crops)}
    found = [which[image.tobytes()] for image in _many(functools.partial(random_shift, pad=3, mode="reflect"))]
    expected = COUNT / len(crops)
    counts = np.bincount(found, minlength=len(crops))
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_noise_is_gaussian_of_the_given_deviation_and_not_clipped():
    std = 0.3
    noise = (_many(functools.partial(augment, pad=0, pad_mode="constant", flip=False, noise_std=std)) - IMAGE) / std
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 5 * np.sqrt(0.6827 * 0.3173 / noise.size)
    assert np.abs(std * noise + IMAGE).max() > 1.2
    # Every pixel of every image has its own.
    assert np.abs(np.corrcoef(noise.reshape(COUNT, -1).T) - np.eye(IMAGE.size)).max() < 6 / np.sqrt(COUNT)


def test_settings_of_nothing_change_nothing():
    images = _many(functools.partial(augment, pad=0, pad_mode="reflect", flip=False, noise_std=0.0))
    assert np.array_equal(images, np.broadcast_to(IMAGE, images.shape))


def test_shift_and_flip_are_drawn_independently():
    images = _many(functools.partial(augment, pad=1, pad_mode="constant", flip=True, noise_std=0.0))
    crops = _crops(1, "constant")
    which = {image.tobytes(): i for i, image in enumerate([*crops, *(crop[:, ::-1] for crop in crops)])}
    counts = np.bincount([which[image.tobytes()] for image in images], minlength=18)
    assert np.abs(counts - COUNT / 18).max() < 5 * np.sqrt(COUNT / 18)
