"""A small JEM on CIFAR-10 that a laptop can try: WRN-10-2 and 10 SGLD steps for 3 epochs.

    python -m jem_jax.main --config=configs/cifar10_small.py

Cost: 2,109 iterations, at the 0.93 a second of a first minute on two cores, one of them busy with something else, 38
minutes of training (no whole run was timed), and the report; the start-up line says how long yours takes.
Expect: blurred, coloured samples and a classifier far from the state of the art. To go on for longer:
--config.training.epochs=10

The paper's step size and buffer do not suit so small a network: the energy is a mean over the last feature map's 64
positions, so the score at a pixel is weak at first, chains stay noise, and log p~ of the samples runs away from that of
the data. With ten times the step and a tenth of the buffer the two stayed together: at 2.47 and 2.42 after the 400
iterations of experiments/checks/cifar10_archive.py (WRN-10-1).
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.model.depth = 10
    config.model.width = 2
    config.sampler.num_steps = 10
    config.sampler.step_size = 10.0
    config.sampler.buffer_size = 1000
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 200
    config.optimizer.decay_epochs = ()
    config.training.epochs = 3
    config.training.log_every = 20
    config.training.sample_every = 1
    config.evaluation.sample_steps = 200
    config.evaluation.num_samples = 50
    return config
