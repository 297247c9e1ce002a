"""SADA-JEM on Fashion-MNIST for a CPU: configs/fashion_mnist_sada.py without ASAM, for three epochs.

    python -m jem_jax.main --config=configs/fashion_mnist_fast.py

Without ASAM an iteration takes one gradient of the loss rather than two.

Cost: 1,263 iterations of 41.6 GFLOP: 22 min 54 s of training on two cores that did other work too.
Expect: 78.4 % test accuracy, ECE 9.1 %, no divergence; an AUROC of log p~(x) of 0.67, the mean of seven outside sets.
One run; its model is experiments/models/fashion_mnist.
"""

import ml_collections

from jem_jax.configs import cifar10_jempp, cifar10_sada, fashion_mnist


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_sada.with_parts(cifar10_jempp.with_parts(fashion_mnist.get_config()), sam_rho=0.0)
    config.data.pad = 1
    config.sampler.step_size = 1.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_epochs = (1.8, 2.4, 2.8)
    config.training.epochs = 3
    config.training.baseline = False
    config.evaluation.sample_steps = 50
    return config
