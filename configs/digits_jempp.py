"""JEM++ on scikit-learn's digits: configs/digits.py with its parts.

python -m jem_jax.main --config=configs/digits_jempp.py
"""

import ml_collections

from jem_jax.configs import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits.get_config()
    config.model.norm = "batch"
    config.sampler.num_steps = 10
    config.sampler.noise_std = 0.0
    config.sampler.grad_clip = 1.0
    config.sampler.clip_x = True
    config.sampler.init = "class_gaussians"
    config.sampler.batch_statistics = True
    config.evaluation.sample_steps = 100
    return config
