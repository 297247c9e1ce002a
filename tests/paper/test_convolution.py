"""The convolution equals XLA's with one pixel of padding, value and gradients, in every way it is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jem_jax import convolution


def _xla(x, kernel, stride):
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def _with_gradients(function, x, kernel, stride):
    """The output, and the gradients of x and kernel for a random cotangent."""

    @jax.jit
    def run(x, kernel):
        y, pullback = jax.vjp(lambda x, kernel: function(x, kernel, stride), x, kernel)
        return y, *pullback(_random(*y.shape, seed=2))

    return run(x, kernel)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "sides"),
    [(3, (6, 9)), (3, (2, 1)), (1, (6, 9))],
)
def test_value_and_gradients_equal_xlas(size, sides, stride):
    with jax.enable_x64(True):
        x, kernel = _random(2, *sides, 3), _random(size, size, 3, 4, seed=1)
        actual = _with_gradients(convolution.conv, x, kernel, stride)
        expected = _with_gradients(_xla, x, kernel, stride)
        assert actual[0].shape == (2, -(-sides[0] // stride), -(-sides[1] // stride), 4)
        for name, ours, theirs in zip(["value", "input gradient", "kernel gradient"], actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_a_gradient_equals_xlas(stride):
    # A regulariser of the score differentiates the input gradient with respect to the kernel.
    def roughness(function):
        def value(kernel):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(function(x, kernel, stride))))(x)
            return jnp.sum(gradient**2)

        return value

    with jax.enable_x64(True):
        x, kernel = _random(2, 5, 6, 2), _random(3, 3, 2, 3, seed=1)
        ours, theirs = (jax.jit(jax.grad(roughness(function)))(kernel) for function in (convolution.conv, _xla))
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
def test_input_gradients_of_every_order_are_convolutions_of_the_forward_form(stride):
    # In another form they are slow within a scan, as in an attack through the chain.
    kernel = _random(3, 3, 2, 3, seed=1)

    def product(x, vector):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(convolution.conv(x, kernel, stride))))
        return jax.grad(lambda x: jnp.sum(gradient(x) * vector))(x)

    lowered = jax.jit(product).lower(*[_random(2, 8, 8, 2)] * 2).as_text()
    forms = re.findall(r"dim_numbers = \[.*?\]x(\[.*?\])", lowered)
    assert set(forms) == {"[0, 1, i, o]"}


@pytest.mark.parametrize(("backend", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_other_backends_get_plain_convolutions_and_keep_forward_differentiation(monkeypatch, backend, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel = _random(2, 8, 8, 3), _random(3, 3, 3, 4, seed=1)

    def program(function):
        gradient = jax.jit(jax.grad(lambda x, kernel: function(x, kernel, 2).sum(), argnums=(0, 1)))
        lowered = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return [line.strip() for line in lowered.splitlines() if "stablehlo.convolution" in line]

    assert program(convolution.conv) == program(_xla)
    assert len(program(_xla)) > 0
    _, moved = jax.jvp(lambda x: convolution.conv(x, kernel, 2), (x,), (x,))
    np.testing.assert_allclose(moved, _xla(x, kernel, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stride"), [((5, 5, 3, 4), 1), ((3, 1, 3, 4), 1), ((3, 3, 3, 4), 3), ((1, 1, 3, 4), 0), ((3,), 1)]
)
def test_another_kernel_or_stride_is_an_error(shape, stride):
    with pytest.raises(ValueError, match=rf"a stride 1 or 2; got {re.escape(str(shape))}, {stride}"):
        convolution.conv(jnp.ones((2, 8, 8, 3)), jnp.ones(shape), stride)
