"""JEM's training iteration in PyTorch: as the official code does it, and as an expert would.

Both are written from descriptions of the algorithm, for experiments/speed/benchmark.py. Arrays have the official
names, so that `jem_jax.torch_import` gives them our weights.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

STEP_SIZE, NOISE_STD, REINIT_PROB = 1.0, 0.01, 0.05


class Shape(NamedTuple):
    """What is trained: a WRN and its images."""

    depth: int
    width: int
    side: int
    channels: int
    classes: int


class Block(nn.Module):
    """leaky ReLU, 3×3, leaky ReLU, 3×3 with the stride; a 1×1 shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*[nn.Conv2d(inputs, outputs, 1, stride)] * changes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] of the inputs -> that of the outputs."""
        y = self.conv1(functional.leaky_relu(x, 0.2))
        return self.conv2(functional.leaky_relu(y, 0.2)) + self.shortcut(x)


class Trunk(nn.Module):
    """A WRN without norm, up to the mean over positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape.channels, 16, 3, padding=1)
        inputs = 16
        for stage in (1, 2, 3):
            outputs = 16 * shape.width * 2 ** (stage - 1)
            blocks = [Block(inputs, outputs, 1 if stage == 1 else 2)]
            blocks += [Block(outputs, outputs, 1) for _ in range((shape.depth - 4) // 6 - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            inputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, 64·width]."""
        y = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return functional.leaky_relu(y, 0.2).mean(dim=(2, 3))


class Network(nn.Module):
    """x [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.f = Trunk(shape)
        self.class_output = nn.Linear(64 * shape.width, shape.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.class_output(self.f(x))


class OfficialLoop:
    """As the official code does it: float32, NCHW, the buffer on the CPU, a pass for each batch, graphs retained.

    Args:
      network: in float32.
      batches: images of p(x), labelled images, both [B, C, H, W], and labels [B], on the device, ready to be used.
    """

    def __init__(self, network: Network, batches: tuple[torch.Tensor, ...], steps: int, slots: int) -> None:
        self.network, self.steps = network, steps
        self.data, self.labelled, self.labels = batches
        self.buffer = torch.empty(slots, *self.data.shape[1:]).uniform_(-1, 1)
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-4)

    def chain(self, x: torch.Tensor) -> torch.Tensor:
        """The ends of K steps of SGLD from x."""
        self.network.eval()
        x = x.clone().requires_grad_()
        for _ in range(self.steps):
            density = self.network(x).logsumexp(1)
            gradient = torch.autograd.grad(density.sum(), [x], retain_graph=True)[0]
            x.data += STEP_SIZE * gradient + NOISE_STD * torch.randn_like(x)
        self.network.train()
        return x.detach()

    def iteration(self) -> None:
        """One whole training iteration."""
        size = len(self.data)
        slots = torch.randint(0, len(self.buffer), (size,))
        fresh = torch.empty(size, *self.buffer.shape[1:]).uniform_(-1, 1)
        again = (torch.rand(size) < REINIT_PROB).float()[:, None, None, None]
        start = again * fresh + (1 - again) * self.buffer[slots]
        negatives = self.chain(start.to(self.data.device))
        self.buffer[slots] = negatives.cpu()
        data = self.network(self.data).logsumexp(1).mean()
        model = self.network(negatives).logsumexp(1).mean()
        loss = model - data + functional.cross_entropy(self.network(self.labelled), self.labels)
        if loss.abs().item() > 1e8:
            raise FloatingPointError("the loss ran away")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class TunedLoop:
    """As an expert would: channels last, one pass for the loss, the buffer on the device, no graph retained.

    On a GPU it computes in bfloat16. `compiled` runs the network through torch.compile.
    Args are those of `OfficialLoop`.
    """

    def __init__(
        self, network: Network, batches: tuple[torch.Tensor, ...], steps: int, slots: int, compiled: bool
    ) -> None:
        self.network, self.steps = network.to(memory_format=torch.channels_last), steps
        data, labelled, self.labels = batches
        self.images = torch.cat([data, labelled]).to(memory_format=torch.channels_last)
        self.size, device = len(data), data.device
        self.buffer = torch.empty(slots, *data.shape[1:], device=device).uniform_(-1, 1)
        self.buffer = self.buffer.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
        self.logits = torch.compile(self.network) if compiled else self.network
        self.on_gpu = device.type == "cuda"

    def _precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.on_gpu else contextlib.nullcontext()

    def chain(self, x: torch.Tensor) -> torch.Tensor:
        """The ends of K steps of SGLD from x."""
        self.network.requires_grad_(False)
        for _ in range(self.steps):
            x.requires_grad_()
            with self._precision():
                logits = self.logits(x)
            gradient = torch.autograd.grad(logits.float().logsumexp(1).sum(), x)[0]
            x = x.detach().add_(gradient, alpha=STEP_SIZE).add_(torch.randn_like(x), alpha=NOISE_STD)
        self.network.requires_grad_(True)
        return x

    def iteration(self) -> None:
        """One whole training iteration."""
        device = self.buffer.device
        slots = torch.randint(0, len(self.buffer), (self.size,), device=device)
        start = self.buffer[slots]
        again = torch.rand(self.size, device=device) < REINIT_PROB
        start = torch.where(again[:, None, None, None], torch.empty_like(start).uniform_(-1, 1), start)
        negatives = self.chain(start)
        self.buffer[slots] = negatives
        with self._precision():
            logits = self.logits(torch.cat([self.images, negatives]))
        data, labelled, model = logits.float().split(self.size)
        loss = model.logsumexp(1).mean() - data.logsumexp(1).mean() + functional.cross_entropy(labelled, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
