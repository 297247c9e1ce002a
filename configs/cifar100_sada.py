"""SADA-JEM on CIFAR-100: the settings of cifar10_sada.py.

    python -m jem_jax.main --config=configs/cifar100_sada.py

Cost: that of cifar10_sada.py, 38 minutes as its floor on an H200, not measured.
Expect: no figure is published for these settings.
"""

import ml_collections

from jem_jax.configs import cifar10_sada


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_sada.get_config()
    config.data.name = "cifar100"
    return config
