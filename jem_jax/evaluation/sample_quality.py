"""The distance of samples from data, in the features and predictions of a given network.

With Inception-v3's features the first is the FID and with its predictions the second the Inception score. With any
other network they are neither, and must not be called so: values compare only within one network and one number of
images.
"""

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017).

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), in squared units of the features; biased upwards where images are few.

    >>> features = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    >>> round(frechet_distance(features, features + [3.0, 4.0]), 6)
    25.0

    Args:
      first, second: [N, D] and [M, D], at least two rows each.

    Raises:
      ValueError: fewer rows, or features that are not finite.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    if min(len(first), len(second)) < 2 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(f"need two or more rows of finite features; got {first.shape} and {second.shape}")
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second)]
    # tr (Σ₁ Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, whose matrix is symmetric: no complex root, singular or not.
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.clip(np.linalg.eigvalsh(root @ covariances[1] @ root), 0, None)
    means = first.mean(axis=0) - second.mean(axis=0)
    distance = means @ means + np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(inner).sum()
    return float(max(distance, 0))


def inception_style_score(log_posteriors: np.ndarray) -> float:
    """exp of the mean KL(p(y | x) || p(y)) over images, from 1 to K (Salimans et al. 2016), without splits.

    Args:
      log_posteriors: [N, K] log p(y | x).
    """
    log_posteriors = log_posteriors.astype(np.float64)
    posteriors = np.exp(log_posteriors)
    log_marginal = np.log(np.clip(posteriors.mean(axis=0), 1e-300, None))
    return float(np.exp((posteriors * (log_posteriors - log_marginal)).sum(axis=-1).mean()))


def measures(log_posteriors: np.ndarray, features: np.ndarray, reference_features: np.ndarray) -> dict[str, float]:
    """Measures of samples by one network: both of the above, its confidence, and the evenness of its predicted classes.

    Args:
      log_posteriors: [N, K] of the samples.
      features: [N, D] of the samples; reference_features: [M, D] of the data.
    """
    shares = class_shares(log_posteriors)
    return {
        "images": len(features),
        "frechet_distance": frechet_distance(features, reference_features),
        "inception_style_score": inception_style_score(log_posteriors),
        "mean_confidence": float(np.exp(log_posteriors.max(axis=-1)).mean()),
        "rarest_class": float(shares.min()),
        "commonest_class": float(shares.max()),
    }


def class_shares(log_posteriors: np.ndarray) -> np.ndarray:
    """The fraction of images that is taken for each class. [N, K] -> [K]."""
    classes = log_posteriors.shape[-1]
    return np.bincount(log_posteriors.argmax(axis=-1), minlength=classes) / len(log_posteriors)


def nearest(queries: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each query's nearest reference by Euclidean distance, to see whether samples are copies of training images.

    Args:
      queries: [N, ...]; references: [M, ...], of the same shape.

    Returns:
      Indices [N] into the references, and distances [N].
    """
    flat_queries = queries.reshape(len(queries), -1).astype(np.float64)
    flat = references.reshape(len(references), -1).astype(np.float64)
    squares = (flat**2).sum(axis=-1)
    indices, distances = np.empty(len(queries), int), np.empty(len(queries))
    for start in range(0, len(queries), 256):
        block = flat_queries[start : start + 256]
        apart = (block**2).sum(axis=-1)[:, None] - 2 * block @ flat.T + squares
        best = apart.argmin(axis=-1)
        indices[start : start + 256] = best
        distances[start : start + 256] = np.sqrt(((block - flat[best]) ** 2).sum(axis=-1))
    return indices, distances
