"""A JEM on CIFAR-10 in ten minutes of one large GPU: WRN-16-8 in bfloat16, batches of 128 and 512.

    python -m jem_jax.main --config=configs/cifar10_ten_minutes.py

SADA-JEM's sampler (K 5, chains of class Gaussians, batch statistics) with labelled batches of 512 and p(x) batches of
128. The learning rate falls linearly to 0. Batch statistics are re-estimated before each validation.

Cost: 14.3 TFLOP an iteration, 38 ms on an H200; 13,000 iterations with compilation, validations and checkpoints take
some nine minutes.
Expect: not measured with these settings. With cross-entropy alone for the first 40 % of 134 epochs and p(x) ramped in
over the next tenth (--config.schedule.p_x_start=0.4 --config.schedule.p_x_ramp=0.1 --config.training.epochs=134) one
run took 558 s on an H200 and reached 89.3 % test accuracy and an ECE of 1.9 %
(experiments/results/queue/ten_minutes_late_p_x.json). The classifier was forgotten while p(x) came in, so p(x) is
learned from the start here.
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
    config.training.batch_size = 128
    config.training.labelled_batch_size = 512
    config.training.epochs = 149
    config.training.baseline = False
    config.training.log_every = 50
    config.training.validate_every = 10
    config.training.sample_every = 20
    config.training.checkpoint_every = 25
    return config
