"""A JEM on CIFAR-10 in ten minutes of one large GPU: WRN-16-8 in bfloat16, cross-entropy first, p(x) ramped in.

    python -m jem_jax.main --config=configs/cifar10_ten_minutes.py

SADA-JEM's sampler (K 5, chains of class Gaussians, batch statistics) with labelled batches of 512 and p(x) batches of
128. The first quarter of the run learns cross-entropy alone, at a third of an iteration's cost; the weight of p(x) then
rises over a tenth. The learning rate falls linearly to 0. Batch statistics are re-estimated before each validation.
"""

import ml_collections

from jem_jax.configs import cifar10_jempp, cifar10_sada


def get_config() -> ml_collections.ConfigDict:
    config = cifar10_sada.with_parts(cifar10_jempp.get_config(), sam_rho=0.0)
    config.model.depth = 16
    config.model.width = 8
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_epochs = ()
    config.optimizer.warmup_steps = 300
    config.schedule.learning_rate = "linear"
    config.schedule.p_x_start = 0.4
    config.schedule.p_x_ramp = 0.1
    config.training.batch_size = 128
    config.training.labelled_batch_size = 512
    config.training.epochs = 100
    config.training.baseline = False
    config.training.log_every = 50
    config.training.validate_every = 10
    config.training.sample_every = 20
    config.training.checkpoint_every = 25
    return config
