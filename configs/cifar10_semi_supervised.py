"""JEM on CIFAR-10 with 4,000 labels: p(y|x) learns from 400 a class, p(x) from every image.

    python -m jem_jax.main --config=configs/cifar10_semi_supervised.py

The classifier beside it sees the same 4,000 labels and nothing else. Which labels: --config.data.labels_seed

Cost: that of cifar10.py, by what an iteration takes 2 h 44 min on an H200 in bfloat16.
Expect: no published figure for these settings; the classifier beside it is the comparison.
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.data.labels_per_class = 400
    return config
