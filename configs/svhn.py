"""JEM on SVHN (cropped digits), as in the paper: the settings of cifar10.py without mirroring.

    python -m jem_jax.main --config=configs/svhn.py

Cost: 159,900 iterations, 6,000 PFLOP: 2 hours 6 minutes as its floor on an H200 (see cifar10.py), not measured.
Expect: a classifier that also draws house numbers; the paper gives no accuracy that could be confirmed.
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.data.name = "svhn_cropped"
    config.data.flip = False
    return config
