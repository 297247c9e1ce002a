"""Data sets as uint8 images and integer labels, in splits that never depend on the run's seed."""

from collections.abc import Callable

from jem_jax.datasets import digits
from jem_jax.datasets.splits import Dataset, Split
from jem_jax.errors import UserError

__all__ = ["Dataset", "Split", "load"]

_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": digits.load}


def load(name: str) -> Dataset:
    """The data set of that name.

    Raises:
      UserError: there is none.
    """
    if name not in _LOADERS:
        raise UserError(f"config.data.name {name!r} is not a data set; there are: {', '.join(sorted(_LOADERS))}")
    return _LOADERS[name]()
