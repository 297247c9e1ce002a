"""A small PyTorch copy of the official network, in float64, and the arrays stored from it.

Its state dict has the official names, so that official arrays load strictly. It serves the tests where the stored
official arrays do not reach: chains in float64, the act norm's start, batch norm while training, and exported networks.

    python tests/helpers/reference_torch.py

writes `tests/data/torch_copy.npz` from the weights and images in `tests/data/reference` (torch 2.13, CPU, seconds).
Keys are `<file of the weights>/<norm>/<what>`; images are NCHW. Of parameter gradients the small ones are kept.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

DATA = Path(__file__).parents[1] / "data"
STORED = DATA / "torch_copy.npz"
IMAGES, SMALL = 2, 1000
"""images of the stored arrays, and entries of the largest parameter gradient among them"""


class ActNorm(nn.Module):
    """scale·(x + loc), with both set by the first batch that passes."""

    def __init__(self, channels):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))

    def forward(self, x):
        if not self.initialized:
            std, mean = torch.std_mean(x.detach(), dim=(0, 2, 3), keepdim=True)
            self.loc.data, self.scale.data = -mean, 1 / (std + 1e-6)
            self.initialized.fill_(1)
        return self.scale * (x + self.loc)


def norm_layer(norm, channels):
    return {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm2d(channels, momentum=0.9),
        "layer": lambda: nn.GroupNorm(1, channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
        "act": lambda: ActNorm(channels),
    }[norm]()


def activate(x):
    return functional.leaky_relu(x, 0.2)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.bn1 = norm_layer(norm, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn2 = norm_layer(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*[nn.Conv2d(inputs, outputs, 1, stride)] * changes)

    def forward(self, x):
        y = self.conv1(activate(self.bn1(x)))
        return self.conv2(activate(self.bn2(y))) + self.shortcut(x)


class Trunk(nn.Module):
    def __init__(self, depth, width, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        channels = 16
        for stage in (1, 2, 3):
            outputs = 16 * width * 2 ** (stage - 1)
            blocks = [Block(channels, outputs, 1 if stage == 1 else 2, norm)]
            blocks += [Block(outputs, outputs, 1, norm) for _ in range((depth - 4) // 6 - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            channels = outputs
        self.bn1 = norm_layer(norm, channels)
        # Unused, and of ten rows whatever the number of classes, in the official code too.
        self.linear = nn.Linear(channels, 10)

    def forward(self, x):
        y = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return activate(self.bn1(y)).mean(dim=(2, 3))


class Network(nn.Module):
    """Logits, in float64, with an energy head that nothing uses."""

    def __init__(self, depth=10, width=1, num_classes=10, norm="none"):
        super().__init__()
        self.f = Trunk(depth, width, norm)
        self.energy_output = nn.Linear(64 * width, 1)
        self.class_output = nn.Linear(64 * width, num_classes)
        self.double().eval()

    def forward(self, x):
        return self.class_output(self.f(x))


def load(state_dict, strict=True, **shape):
    """The network in evaluation mode with these NumPy arrays as its state."""
    network = Network(**shape)
    network.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()}, strict=strict)
    return network


def score(network, x):
    """∇_x of log p~(x)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(network(x).logsumexp(1).sum(), x)[0]


def chain(network, x, steps, clipped=False):
    """SGLD of step size 1 without noise; `clipped` limits the gradient to ±1, and x to [-1, 1]."""
    for _ in range(steps):
        gradient = score(network, x)
        x = (x + gradient.clamp(-1, 1)).clamp(-1, 1) if clipped else x + gradient
    return x


def jem_loss(network, x, y):
    """The JEM loss on the images, their negatives and their mirror images, which pass in this order."""
    data, negatives = (network(batch).logsumexp(1).mean() for batch in (x, -x))
    return negatives - data + functional.cross_entropy(network(x.flip(3)), y)


def official(name):
    """State dict and inputs (float64) of a stored official file."""
    with np.load(DATA / "reference" / f"official_{name}.npz") as arrays:
        state = {key.removeprefix("state/"): arrays[key] for key in arrays if key.startswith("state/")}
        return state, torch.tensor(arrays["x"]).double(), torch.tensor(arrays["y"])


def chains(name="wrn_10_1"):
    state, x, _ = official(name)
    network, x = load(state), x[:IMAGES]
    ends = {"chain_5": chain(network, x, 5), "chain_20": chain(network, x, 20)}
    return ends | {"chain_5_clipped": chain(network, x, 5, clipped=True)}


def batch_norm(name="wrn_10_1_batch"):
    """One loss in training mode, and the running statistics after it; on images of half the sides, which take less."""
    state, x, y = official(name)
    network = load(state, norm="batch").train()
    loss = jem_loss(network, x[:IMAGES, :, ::2, ::2], y[:IMAGES])
    loss.backward()
    gradients = {f"grad/{key}": value.grad for key, value in network.named_parameters() if value.numel() <= SMALL}
    results = {"loss": loss} | {key: value for key, value in gradients.items() if value is not None}
    return results | {f"after/{key}": value for key, value in network.named_buffers() if "running" in key}


def act_norm(name="wrn_10_1"):
    """The start that the images give, and a loss after it."""
    state, x, y = official(name)
    network = load(state, strict=False, norm="act")
    x = x[:IMAGES, :, ::2, ::2]
    network(x)
    start = {f"start/{key}": value for key, value in network.named_parameters() if ".bn" in key}
    return {**start, "loss": jem_loss(network, x, y[:IMAGES])}


def arrays():
    """Everything that is stored."""
    groups = {"wrn_10_1/none": chains(), "wrn_10_1_batch/batch": batch_norm(), "wrn_10_1/act": act_norm()}
    return {f"{group}/{key}": value.detach().numpy() for group in groups for key, value in groups[group].items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    meta = f"python tests/helpers/reference_torch.py, torch {torch.__version__}, float64 on CPU"
    np.savez_compressed(STORED, meta=np.array(meta), **arrays())
    print(f"wrote {STORED}, {STORED.stat().st_size / 2**20:.2f} MiB")
