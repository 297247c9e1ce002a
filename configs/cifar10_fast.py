"""A JEM on CIFAR-10 for a few minutes of one large GPU: WRN-16-4 in bfloat16 and 10 SGLD steps.

    python -m jem_jax.main --config=configs/cifar10_fast.py

Cost: 14,060 iterations of 1.56 TFLOP, 22 PFLOP. At the 790 TFLOP/s at which an H200 multiplies bf16 matrices that
would be 28 s: a floor. A network this narrow reaches a part of that rate; 10 % would be 5 minutes. Not measured yet.
Expect: not known yet; nobody has trained it to its end.
"""

import ml_collections

from jem_jax.configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.model.depth = 16
    config.model.width = 4
    config.model.dtype = "bfloat16"
    config.sampler.num_steps = 10
    config.objective.share_batch = True
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.decay_epochs = (14, 18)
    config.training.epochs = 20
    config.training.baseline = False
    config.training.validate_every = 2
    config.training.checkpoint_every = 4
    return config
