"""JEM on CIFAR-10, as in the paper: WRN-28-10 with no norm, Adam, 20 SGLD steps.

    python -m jem_jax.main --config=configs/cifar10.py

The schedule is the paper's (150 epochs, decays at 50 and 100). The released code's defaults:
--config.training.epochs=200 --config.optimizer.decay_epochs="(160, 180)"

Cost: 105,450 iterations of 37.3 TFLOP. On an H200 an iteration takes 93 ms with --config.model.dtype=bfloat16, so 2 h
44 min in all, and 176 ms with the default, float32, which JAX rounds to TF32 there (docs/pages/performance.md). The
official loop is reported at about 2.2 s an iteration on a V100: 64 hours.
Expect: 92.9 % test accuracy, IS 8.76, FID 38.4 (Grathwohl et al. 2020). Training may diverge, as the paper says.
"""

import ml_collections

from jem_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.data.name = "cifar10"
    config.data.pad = 4
    config.data.pad_mode = "reflect"
    config.data.flip = True
    config.data.input_noise = 0.03
    config.model.depth = 28
    config.model.width = 10
    config.sampler.num_steps = 20
    config.sampler.step_size = 1.0
    config.sampler.noise_std = 0.01
    config.sampler.reinit_prob = 0.05
    config.sampler.buffer_size = 10_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.decay_epochs = (50, 100)
    config.optimizer.decay_factor = 0.3
    config.training.batch_size = 64
    config.training.epochs = 150
    config.training.log_every = 50
    config.training.validate_every = 1
    config.training.sample_every = 5
    config.training.checkpoint_every = 1
    return config
