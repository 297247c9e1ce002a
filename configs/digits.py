"""A JEM on scikit-learn's 8×8 digits: WRN-10-1 with no norm, no download.

    python -m jem_jax.main --config=configs/digits.py

Cost: 612 iterations of 2.16 GFLOP; on 2 cores 10 to 11 s of training and 37 to 39 s for the whole command, with the
report of both models.
Expect: 97.7 % test accuracy (97.4 to 98.0 over 3 seeds), and digits drawn from noise. All of it was measured by
experiments/paper/digits_seeds.py; docs/pages/results.md has the rest. digits_paper.py has the paper's own settings.
"""

import ml_collections

from jem_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.data.name = "digits"
    config.data.pad = 1
    config.data.pad_mode = "constant"
    config.data.input_noise = 0.03
    config.model.depth = 10
    config.model.width = 1
    config.sampler.num_steps = 8
    config.sampler.buffer_size = 2000
    # Without this clip and energy_l2, chains at this learning rate diverge, or lose whole classes.
    config.sampler.grad_clip = 1.0
    config.objective.p_x = 0.4
    config.objective.energy_l2 = 0.01
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 100
    config.schedule.learning_rate = "linear"
    config.training.batch_size = 32
    config.training.labelled_batch_size = 64
    config.training.epochs = 34
    config.training.validate_every = 4
    config.training.checkpoint_every = 4
    # All sets are cut alike, so that one compiled program serves them.
    config.evaluation.batch_size = 50
    config.evaluation.sample_steps = 500
    config.evaluation.ood_images = 500
    config.evaluation.attack_images = 500
    config.evaluation.attack_linf = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3)
    config.evaluation.attack_l2 = (0.25, 0.5, 1.0, 2.0)
    config.evaluation.refined_images = 50
    config.evaluation.refined_linf = (0.1,)
    return config
