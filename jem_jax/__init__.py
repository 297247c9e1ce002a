"""Joint Energy-based Models in JAX: a classifier that is also an energy-based model of its inputs."""

__version__ = "0.1.0"
