"""Augmentation: what can come out, and how often."""

import functools

import jax
import numpy as np
import pytest

from jem_jax.augment import augment

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


@pytest.mark.parametrize(("pad", "mode", "flip"), [(3, "reflect", False), (1, "constant", True), (0, "reflect", False)])
def test_images_are_all_crops_of_the_padded_one_and_their_mirrors_equally_often(pad, mode, flip):
    images = _many(functools.partial(augment, pad=pad, pad_mode=mode, flip=flip, noise_std=0.0))
    crops = _crops(pad, mode)
    crops += [crop[:, ::-1] for crop in crops] * flip
    which = {crop.tobytes(): i for i, crop in enumerate(crops)}
    counts = np.bincount([which[image.tobytes()] for image in images], minlength=len(crops))
    assert np.abs(counts - COUNT / len(crops)).max() < 5 * np.sqrt(COUNT / len(crops))


def test_noise_is_gaussian_of_the_given_deviation_and_not_clipped():
    std = 0.3
    noise = (_many(functools.partial(augment, pad=0, pad_mode="constant", flip=False, noise_std=std)) - IMAGE) / std
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 5 * np.sqrt(0.6827 * 0.3173 / noise.size)
    assert np.abs(std * noise + IMAGE).max() > 1.2
    # Every pixel of every image has its own.
    assert np.abs(np.corrcoef(noise.reshape(COUNT, -1).T) - np.eye(IMAGE.size)).max() < 6 / np.sqrt(COUNT)
