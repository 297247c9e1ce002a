"""JEM on SVHN (cropped digits), as in the paper: the settings of cifar10.py without mirroring.

    python -m jem_jax.main --config=configs/svhn.py

Cost: 68,257 training images are half as many again as CIFAR-10's, and so is the time of cifar10.py.
Expect: a classifier that also draws house numbers; the paper gives no accuracy that could be confirmed.
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.data.name = "svhn_cropped"
    config.data.flip = False
    return config
