"""A whole Joint Energy-based Model: one network that classifies digits and draws them.

    python experiments/jem_in_100_lines.py

Algorithm 1 of "Your classifier is secretly an energy based model" (https://arxiv.org/abs/1912.03263) on scikit-learn's
1,797 digits of 8×8 pixels. It prints test accuracy, and draws one row of digits for each class into jem_digits.png.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from jem_jax import energy, objective, replay_buffer, sgld
from jem_jax.wide_resnet import WideResNet

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--iterations", type=int, default=600)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--picture", default="jem_digits.png")
args = parser.parse_args()

BATCH, TEST, SLOTS, SHAPE = 64, 500, 2000, (8, 8, 1)
CHAIN = {"num_steps": 20, "step_size": 1.0, "noise_std": 0.01}  # the paper's SGLD

# Data: pixels in [-1, 1]. The last 500 of a fixed shuffle are the test images.
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.images[order, ..., None] / 8 - 1, jnp.float32)
labels = jnp.asarray(digits.target[order])
x_train, y_train, x_test, y_test = images[:-TEST], labels[:-TEST], images[-TEST:], labels[-TEST:]

# Model: any network x -> logits. Its logits are log p~(x, y), so log p~(x) = logsumexp of the logits.
network = WideResNet(num_classes=10, depth=10, width=1)
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.iterations // 8, args.iterations)
optimizer = optax.adam(schedule)


def loss(params, x, y, negatives):
    """Cross-entropy for log p(y|x), and for log p(x) the contrast of the data with the model's own samples."""
    logits = network.apply(params, x)
    batches = objective.Logits(labelled=logits, data=logits, negatives=network.apply(params, negatives))
    return objective.joint_loss(batches, y, objective.Weights(p_y_given_x=1.0, p_x=1.0))


@jax.jit
def train_step(key, params, opt_state, buffer):
    batch_key, noise_key, fresh_key, draw_key, chain_key = jax.random.split(key, 5)

    # A batch of data, with a little noise as in the paper.
    batch = jax.random.choice(batch_key, len(x_train), (BATCH,), replace=False)
    x = x_train[batch] + 0.03 * jax.random.normal(noise_key, (BATCH, *SHAPE))

    # Draw: chains go on from the replay buffer; 5 % of them start afresh from uniform noise.
    fresh = replay_buffer.uniform(fresh_key, BATCH, SHAPE)
    start = replay_buffer.draw(draw_key, buffer, fresh, reinit_prob=0.05)

    # Chain: x <- x + ∇ log p~(x) + noise. The samples are constants to the loss.
    log_density = energy.marginal(partial(network.apply, params))
    negatives = jax.lax.stop_gradient(sgld.chain(chain_key, log_density, start.x, **CHAIN))

    # Loss, gradient, update; and the chains go back to where they came from.
    gradients, metrics = jax.grad(loss, has_aux=True)(params, x, y_train[batch], negatives)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, replay_buffer.write(buffer, start.slots, negatives), metrics


key = jax.random.key(args.seed)
init_key, buffer_key, train_key, sample_key = jax.random.split(key, 4)
params = jax.jit(network.init)(init_key, x_train[:1])
opt_state = optimizer.init(params)
buffer = replay_buffer.init(buffer_key, SLOTS, SHAPE)
for i in range(args.iterations):
    params, opt_state, buffer, m = train_step(jax.random.fold_in(train_key, i), params, opt_state, buffer)
    if i % 50 == 0 or i == args.iterations - 1:  # log p~ of data and of samples should stay close together
        log_px = f"log p~(x): data {m['log_px_data']:.2f}, samples {m['log_px_samples']:.2f}"
        print(f"iteration {i:3d}  cross-entropy {m['cross_entropy']:.3f}  {log_px}", flush=True)

# What it classifies.
logits_fn = jax.jit(partial(network.apply, params))
accuracy = jnp.mean(jnp.argmax(logits_fn(x_test), axis=-1) == y_test)
print(f"test accuracy {accuracy:.1%}")

# What it draws: chains of log p(x|y) from noise, ten of each class, one row a class.
noise = replay_buffer.uniform(sample_key, 100, SHAPE)
log_density = energy.conditional(logits_fn, jnp.repeat(jnp.arange(10), 10))
samples = jax.jit(lambda x: sgld.chain(sample_key, log_density, x, **CHAIN | {"num_steps": 300}))(noise)
framed = jnp.pad(samples[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
sheet = framed.reshape(10, 10, 10, 10).swapaxes(1, 2).reshape(100, 100)
plt.imsave(args.picture, np.kron(sheet, np.ones((5, 5))), cmap="gray", vmin=-1, vmax=1)
print(f"samples in {args.picture}")
