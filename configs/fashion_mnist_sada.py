"""SADA-JEM on Fashion-MNIST: configs/fashion_mnist.py with its parts, 5 steps a chain, and the paper's step size.

    python -m jem_jax.main --config=configs/fashion_mnist_sada.py

Of ASAM's radius a quarter of the released 2, as in digits_sada.py.

Cost: 842 iterations of 61.6 GFLOP, 60 % of fashion_mnist.py's arithmetic.
"""

import ml_collections

from jem_jax.configs import cifar10_jempp, fashion_mnist


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_jempp.with_parts(fashion_mnist.get_config())
    config.data.augment_p_x = False
    config.data.input_noise = 0.0
    config.sampler.num_steps = 5
    config.sampler.step_size = 1.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.sam_rho = 0.5
    config.optimizer.sam_adaptive = True
    config.optimizer.decay_epochs = (1.4, 1.8)
    config.training.labelled_batch_size = 128
    config.evaluation.sample_steps = 50
    return config
