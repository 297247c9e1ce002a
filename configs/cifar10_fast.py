"""A JEM on CIFAR-10 for a few minutes of one large GPU: SADA-JEM's parts without ASAM, WRN-16-4 in bfloat16.

python -m jem_jax.main --config=configs/cifar10_fast.py

"""

import ml_collections

from jem_jax.configs import cifar10_jempp, cifar10_sada


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_sada.with_parts(cifar10_jempp.get_config(), sam_rho=0.0)
    config.model.depth = 16
    config.model.width = 4
    config.model.dtype = "bfloat16"
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_epochs = (18, 36, 54)
    config.training.epochs = 60
    config.training.baseline = False
    config.training.validate_every = 5
    config.training.checkpoint_every = 5
    return config
