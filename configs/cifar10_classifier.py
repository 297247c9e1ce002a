"""The plain classifier that cifar10.py is compared with: the same network and schedule, cross-entropy alone.

    python -m jem_jax.main --config=configs/cifar10_classifier.py

With batch norm, as plain WRNs are usually trained: --config.model.norm=batch

Cost: 105,450 iterations, 240 PFLOP, a sixteenth of cifar10.py's: 5 minutes as its floor on an H200, not measured.
Expect: about 93.6 % test accuracy without norm and 95.8 to 96.2 % with batch norm, as published.
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.objective.p_x = 0.0
    return config
