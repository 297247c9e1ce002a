"""The one convolution of this package, whose input gradient is fast inside a scan on every backend.

XLA's CPU backend rewrites convolutions to their fast form in a program's entry computation only. The input gradient
that autodiff makes inside `lax.scan`, where an SGLD chain needs it, misses that rewrite: a whole training iteration
then takes 5 to 7 times as long (`python -m experiments.speed.levers --preset=cpu`). On CPU the input gradient is
therefore written as the forward convolution that it is. That costs forward-mode differentiation (`jax.jvp`), which
other backends keep.

A convolution of very few pixels, such as the last feature map of 8×8 digits, is slow on a CPU in either form. It is
written as the product with its matrix there.
"""

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

Array = jax.Array
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_FEW_PIXELS = 4
"""Up to so many pixels of the output the matrix is the faster form on a CPU; at 16 the convolution is"""
_plain = ContextVar("_plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it `conv` is the plain convolution on every backend, whose arithmetic can be counted from its shapes."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """A 3×3 convolution with one pixel of zero padding on every side, or a 1×1 without, as PyTorch pads them.

    XLA's "SAME" pads (0, 1) at stride 2 and an even side, which is another network.

    Args:
      x: [B, H, W, C] of any sides.
      kernel: [3, 3, C, D] or [1, 1, C, D], of x's dtype.
      stride: 1 or 2.

    Returns:
      [B, ⌈H/stride⌉, ⌈W/stride⌉, D].

    Raises:
      ValueError: another kernel size or stride.
    """
    size = kernel.shape[:2]
    if kernel.ndim != 4 or size not in ((3, 3), (1, 1)) or stride not in (1, 2):
        raise ValueError(f"a kernel is [3, 3, C, D] or [1, 1, C, D] and a stride 1 or 2; got {kernel.shape}, {stride}")
    if size == (1, 1):
        # A plain matrix product is faster than a strided 1×1 convolution, forwards and backwards.
        return jnp.einsum("bhwc,cd->bhwd", x[:, ::stride, ::stride], kernel[0, 0])
    if jax.default_backend() == "cpu" and not _plain.get():
        if -(-x.shape[1] // stride) * -(-x.shape[2] // stride) <= _FEW_PIXELS:
            return _as_matrix_product(x, kernel, stride)
        return _conv3x3_forward_gradient(x, kernel, stride)
    return _conv3x3(x, kernel, stride)


def _conv3x3(x: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT)


def _as_matrix_product(x: Array, kernel: Array, stride: int) -> Array:
    height, width = x.shape[1:3]
    # A column of the matrix is a pixel of the output: the kernel laid over the image, moved to where that pixel is.
    padded = jnp.pad(kernel, ((height, height), (width, width), (0, 0), (0, 0)))
    tops, lefts = range(0, height, stride), range(0, width, stride)
    columns = [
        padded[height + 1 - top : 2 * height + 1 - top, width + 1 - left : 2 * width + 1 - left]
        for top, left in itertools.product(tops, lefts)
    ]
    matrix = jnp.stack(columns, axis=3).reshape(height * width * kernel.shape[2], -1)
    return (x.reshape(len(x), -1) @ matrix).reshape(len(x), len(tops), len(lefts), -1)


def _transposed(gradient: Array, kernel: Array, shape: tuple[int, ...], stride: int) -> Array:
    """The transpose of `_conv3x3` in x of that shape, as a forward convolution of the output's gradient."""
    if stride == 1:
        return _conv3x3(gradient, kernel[::-1, ::-1].swapaxes(2, 3), 1)
    padding = tuple((1, 2) if side % 2 == 0 else (1, 1) for side in shape[1:3])
    return jax.lax.conv_transpose(gradient, kernel, (2, 2), padding, dimension_numbers=_LAYOUT, transpose_kernel=True)


def _transposed_forward(
    gradient: Array, kernel: Array, shape: tuple[int, ...], stride: int
) -> tuple[Array, tuple[Array, Array]]:
    # The function with the custom rule, here and in `_forward`, so that second derivatives have the fast form too.
    return _input_gradient(gradient, kernel, shape, stride), (gradient, kernel)


def _transposed_backward(
    shape: tuple[int, ...], stride: int, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    # Backpropagation through a chain comes here: the transpose of the transpose is the convolution itself.
    gradient, kernel = residuals
    kernel_cotangent = jax.vjp(lambda kernel: _transposed(gradient, kernel, shape, stride), kernel)[1](cotangent)[0]
    return _conv3x3_forward_gradient(cotangent, kernel, stride), kernel_cotangent


_input_gradient = jax.custom_vjp(_transposed, nondiff_argnums=(2, 3))
_input_gradient.defvjp(_transposed_forward, _transposed_backward)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _conv3x3_forward_gradient(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    # The compiler drops whichever of the two is not asked for: a chain never computes the kernel's.
    kernel_gradient = jax.vjp(lambda kernel: _conv3x3(x, kernel, stride), kernel)[1](gradient)[0]
    return _input_gradient(gradient, kernel, x.shape, stride), kernel_gradient


_conv3x3_forward_gradient = jax.custom_vjp(_conv3x3, nondiff_argnums=(2,))
_conv3x3_forward_gradient.defvjp(_forward, _backward)
