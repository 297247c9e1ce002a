"""The wide residual network of JEM, WRN-d-k (Zagoruyko and Komodakis 2016, as the official JEM code builds it).

A block is norm, leaky ReLU, 3×3 conv, dropout, norm, leaky ReLU, 3×3 conv. The stride is on the second conv. Where the
shape changes, a 1×1 shortcut of the raw input is added. Convolutions have biases; JEM's own network has no norm.
Weights start from PyTorch's default: uniform in ±1/√fan_in, kernels and biases alike.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jem_jax import convolution

Array = jax.Array

NORMS = ("none", "batch", "instance", "layer", "act")
ACTIVATIONS = ("leaky_relu", "swish", "softplus")
NEGATIVE_SLOPE = 0.2
EPSILON = 1e-5


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """A 3×3 or 1×1 convolution with bias and PyTorch's padding and initialisation."""

    features: int
    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, ⌈H/stride⌉, ⌈W/stride⌉, features] in `dtype`."""
        channels = x.shape[-1]
        # Flax traces the initialiser in every pass, to compare shapes; zeros are traced in a tenth of the time.
        init = _uniform(self.size**2 * channels) if self.is_initializing() else nn.initializers.zeros
        kernel = self.param("kernel", init, (self.size, self.size, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        y = convolution.conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        return y + bias.astype(self.dtype)


def cast(params: Any, dtype: Any) -> Any:
    """Parameters of a WRN, the convolutions' in the dtype that `Conv` casts them to."""
    if not isinstance(params, Mapping):
        return params
    if "kernel" in params and params["kernel"].ndim == 4:
        return {name: value.astype(dtype) for name, value in params.items()}
    return {name: cast(value, dtype) for name, value in params.items()}


class BatchNorm(nn.Module):
    """Batch norm as PyTorch has it: the running variance is unbiased. Statistics are float32, of this device's batch.

    `momentum` is the weight of the new batch (official code: 0.9, where PyTorch's default is 0.1).
    """

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[B, ..., C] -> the same; `train` uses the batch's statistics and, if mutable, updates the running ones."""
        shape, kind = x.shape[-1:], _statistics_dtype(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not train:
            return _normalise(x, mean.value, variance.value, scale, bias)
        axes = tuple(range(x.ndim - 1))
        count = math.prod(x.shape[:-1])
        # Both moments in one pass over x, about the running mean, so that no digits are lost where the mean is large.
        centred = x.astype(kind) - mean.value
        offset, square = jnp.mean(centred, axes), jnp.mean(jnp.square(centred), axes)
        batch_mean = mean.value + offset
        batch_variance = jnp.maximum(square - jnp.square(offset), 0)
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            unbiased = batch_variance * count / max(count - 1, 1)
            mean.value = (1 - self.momentum) * mean.value + self.momentum * batch_mean
            variance.value = (1 - self.momentum) * variance.value + self.momentum * unbiased
        return _normalise(x, batch_mean, batch_variance, scale, bias)


class ActNorm(nn.Module):
    """scale·(x + loc) per channel, started from the statistics of the batch that `init` is called with."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, ..., C] -> the same."""
        axes = tuple(range(x.ndim - 1))
        kind = _statistics_dtype(x)
        loc = self.param("loc", lambda _: -jnp.mean(x, axes, dtype=kind))
        scale = self.param("scale", lambda _: 1 / (jnp.std(x.astype(kind), axes, ddof=1) + 1e-6))
        return (scale * (x.astype(kind) + loc)).astype(x.dtype)


def _statistics_dtype(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _normalise(x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
    factor = scale * jax.lax.rsqrt(variance + EPSILON)
    return ((x.astype(_statistics_dtype(x)) - mean) * factor + bias).astype(x.dtype)


class Norm(nn.Module):
    """The chosen norm layer; "none" is the identity, as in JEM."""

    kind: str
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[B, H, W, C] -> the same."""
        match self.kind:
            case "none":
                return x
            case "batch":
                return BatchNorm(self.momentum, name="norm")(x, train)
            case "act":
                return ActNorm(name="norm")(x)
            case "instance":
                return _group_norm(x, num_groups=None, group_size=1)
            case "layer":
                return _group_norm(x, num_groups=1)
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {self.kind!r}")


def _group_norm(x: Array, **groups: Any) -> Array:
    # Flax's fast variance, E[x²] - E[x]², loses its digits where the mean is large.
    return nn.GroupNorm(**groups, epsilon=EPSILON, use_fast_variance=False, dtype=x.dtype, name="norm")(x)


class Block(nn.Module):
    """One residual block; `stride` sits on the second convolution."""

    features: int
    stride: int
    norm: str
    norm_momentum: float
    dropout: float
    dtype: Any
    activation: str

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[B, H, W, C] -> [B, ⌈H/stride⌉, ⌈W/stride⌉, features]."""
        conv = functools.partial(Conv, self.features, dtype=self.dtype)
        y = _activate(self.activation, Norm(self.norm, self.norm_momentum, name="norm1")(x, train))
        y = conv(name="conv1")(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = _activate(self.activation, Norm(self.norm, self.norm_momentum, name="norm2")(y, train))
        y = conv(stride=self.stride, name="conv2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(size=1, stride=self.stride, name="shortcut")(x)
        return x + y


def _activate(kind: str, x: Array) -> Array:
    match kind:
        case "leaky_relu":
            return nn.leaky_relu(x, NEGATIVE_SLOPE)
        case "swish":
            return nn.swish(x)
        case "softplus":
            return nn.softplus(x)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {kind!r}")


class WideResNet(nn.Module):
    """WRN-depth-width: x [B, H, W, C] in [-1, 1] -> logits [B, num_classes].

    Attributes:
      num_classes: K.
      depth: 6n + 4 with n >= 1; n blocks in each of three stages.
      width: k; the stages have 16k, 32k and 64k channels, the last two halve the sides.
      norm: one of `NORMS`.
      norm_momentum: weight of the newest batch in batch norm's running statistics.
      dropout: probability of dropping a unit between a block's convolutions, while training.
      activation: one of `ACTIVATIONS`; JEM's is leaky ReLU with slope 0.2.
      dtype: of the computation (float32 or bfloat16); parameters are float32, logits at least float32.
    """

    num_classes: int
    depth: int = 28
    width: int = 10
    norm: str = "none"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    activation: str = "leaky_relu"
    norm_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool = False, features: bool = False) -> Array:
        """The logits, or the penultimate features [B, 64·width].

        Args:
          x: [B, H, W, C].
          train: batch statistics instead of running ones, dropout on (needs rngs={"dropout": key}).
          features: return what the last linear layer sees instead of the logits.

        Raises:
          ValueError: depth is not 6n + 4, an unknown norm, or sides that two halvings do not divide.
        """
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, …), not {self.depth}")
        if x.ndim != 4 or any(side < 4 or side % 4 for side in x.shape[1:3]):
            raise ValueError(f"images must be [B, H, W, C] with sides that halve twice (multiples of 4), not {x.shape}")
        x = Conv(16, dtype=self.dtype, name="conv1")(x)
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                x = Block(
                    features=16 * 2**stage * self.width,
                    stride=2 if stage > 0 and block == 0 else 1,
                    norm=self.norm,
                    norm_momentum=self.norm_momentum,
                    dropout=self.dropout,
                    dtype=self.dtype,
                    activation=self.activation,
                    name=f"stage{stage + 1}_block{block}",
                )(x, train)
        x = _activate(self.activation, Norm(self.norm, self.norm_momentum, name="norm")(x, train))
        x = jnp.mean(x, axis=(1, 2), dtype=_statistics_dtype(x))
        if features:
            return x
        init = _uniform(x.shape[-1])
        return nn.Dense(self.num_classes, dtype=x.dtype, kernel_init=init, bias_init=init, name="classes")(x)
