"""SADA-JEM on Fashion-MNIST for a CPU: configs/fashion_mnist_sada.py without ASAM, and p(x) learned late.

    python -m jem_jax.main --config=configs/fashion_mnist_fast.py
"""

import ml_collections

from jem_jax.configs import cifar10_jempp, cifar10_sada, fashion_mnist


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_sada.with_parts(cifar10_jempp.with_parts(fashion_mnist.get_config()), sam_rho=0.0)
    config.data.pad = 1
    config.sampler.step_size = 1.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_epochs = ()
    config.schedule.learning_rate = "linear"
    config.schedule.p_x_start = 0.4
    config.schedule.p_x_ramp = 0.1
    config.training.epochs = 4
    config.training.baseline = False
    config.evaluation.sample_steps = 50
    return config
