"""JEM++ on CIFAR-100: the settings of cifar10_jempp.py.

    python -m jem_jax.main --config=configs/cifar100_jempp.py

Cost: that of cifar10_jempp.py, 49 minutes as its floor on an H200, not measured.
Expect: no figure is published for these settings.
"""

import ml_collections

from jem_jax.configs import cifar10_jempp


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_jempp.get_config()
    config.data.name = "cifar100"
    return config
