"""A JEM on scikit-learn's 8×8 digits: no download, some minutes on two cores.

python -m jem_jax.main --config=configs/digits.py
"""

import ml_collections

from jem_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.data.name = "digits"
    config.data.pad = 1
    config.data.pad_mode = "constant"
    config.data.input_noise = 0.03
    config.model.depth = 10
    config.model.width = 1
    config.sampler.num_steps = 20
    config.sampler.buffer_size = 2000
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_epochs = (24, 34)
    config.optimizer.decay_factor = 0.3
    config.training.batch_size = 64
    config.training.epochs = 40
    return config
