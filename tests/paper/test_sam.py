"""SAM and ASAM on a quadratic."""

import jax
import numpy as np
import tiny

from jem_jax import sam

W = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([[0.5]], np.float32)}
CURVATURE = {"a": np.array([3.0, 1.0], np.float32), "b": np.array([[4.0]], np.float32)}


def _gradient(w):
    """Of ½ Σ curvature · w²."""
    return {name: CURVATURE[name] * w[name] for name in w}


_ascend = jax.jit(sam.ascend, static_argnames="adaptive")


def test_sam_climbs_along_the_gradient_by_rho():
    climbed = _ascend(W, _gradient(W), 0.1, adaptive=False)
    norm = np.sqrt(3.0**2 + 2.0**2 + 2.0**2)
    np.testing.assert_allclose(climbed["a"], [1 + 0.1 * 3 / norm, -2 - 0.1 * 2 / norm], rtol=1e-6)
    np.testing.assert_allclose(climbed["b"], [[0.5 + 0.1 * 2 / norm]], rtol=1e-6)


def test_asam_climbs_by_the_squared_weights_and_nowhere_without_a_gradient():
    climbed = _ascend(W, _gradient(W), 2.0, adaptive=True)
    # |w|·g is 3, 4 and 1; w²·g is 3, -8 and 0.5.
    norm = np.sqrt(9 + 16 + 1)
    np.testing.assert_allclose(climbed["a"], [1 + 2 * 3 / norm, -2 - 2 * 8 / norm], rtol=1e-6)
    np.testing.assert_allclose(climbed["b"], [[0.5 + 2 * 0.5 / norm]], rtol=1e-6)
    # Scaling a weight up and its gradient down, as a normalised layer allows, scales the climb alone.
    tenfold, tenth = ({name: factor * w for name, w in tree.items()} for factor, tree in ((10, W), (0.1, _gradient(W))))
    for name, value in _ascend(tenfold, tenth, 2.0, adaptive=True).items():
        np.testing.assert_allclose(value, 10 * climbed[name], rtol=1e-5)
    assert not tiny.differing(_ascend(W, jax.tree.map(np.zeros_like, W), 2.0, adaptive=True), W)
