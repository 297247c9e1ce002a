"""JEM on SVHN (cropped digits), as in the paper: the settings of cifar10.py without mirroring.

    python -m jem_jax.main --config=configs/svhn.py

Cost: 159,900 iterations, 6,000 PFLOP: 4 h 9 min on an H200 in bfloat16, by what one of cifar10.py takes there.
Expect: a classifier that also draws house numbers; the paper gives no accuracy.
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.data.name = "svhn_cropped"
    config.data.flip = False
    return config
