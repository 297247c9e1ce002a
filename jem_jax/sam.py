"""Sharpness-aware minimisation: where the second gradient is taken (SAM: Foret et al. 2021; ASAM: Kwon et al. 2021).

Both look for weights around which the loss is flat: the gradient at the highest point nearby, to first order, moves
the weights themselves. SADA-JEM takes it with the negatives held fixed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def ascend(params: Any, gradients: Any, rho: float, adaptive: bool) -> Any:
    """The point to which SAM or ASAM climbs from `params`.

    SAM: w + ρ·g/‖g‖. ASAM: w + ρ·w²·g/‖|w|·g‖, a step that grows with each weight (SADA-JEM: ρ = 2). Norms are over
    all parameters together.

    Args:
      params: a pytree of weights w.
      gradients: the loss's gradient g there.
      rho: ρ, the radius.
      adaptive: ASAM instead of SAM.

    Returns:
      A pytree like `params`.
    """
    scale = jax.tree.map(jnp.abs, params) if adaptive else jax.tree.map(jnp.ones_like, params)
    norm = optax.global_norm(jax.tree.map(jnp.multiply, scale, gradients))
    # The released code adds this too.
    factor = rho / (norm + 1e-12)
    return jax.tree.map(lambda w, t, g: w + factor * t**2 * g, params, scale, gradients)
