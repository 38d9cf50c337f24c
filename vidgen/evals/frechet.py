"""Frechet distance of two sets of features, in float64 on the host, from streamed statistics."""

import dataclasses

import numpy as np

from vidgen.core.errors import UserError
from vidgen.core.typing import Float

__all__ = ["Moments", "frechet_distance"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and scatter of features; moments add up, so features need not be stored.

    Attributes:
      count: number of feature vectors.
      mean: mean of each feature.
      scatter: sum of the outer products of deviations from the mean.
    """

    count: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Moments":
        """Moments of a set of features, at least one.

        Raises:
          UserError: some features are not finite.
        """
        x = np.asarray(features, np.float64)
        if not np.isfinite(x).all():
            raise UserError(f"{(~np.isfinite(x).all(1)).sum()} of {len(x)} features are not finite numbers")
        mean = x.mean(0)
        return cls(count=len(x), mean=mean, scatter=(x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets together (Chan et al. 1979, Updating formulae and a pairwise algorithm)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(
            count=count,
            mean=self.mean + shift * (other.count / count),
            scatter=self.scatter + other.scatter + between,
        )

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased covariance, over n - 1.

        Raises:
          UserError: the set has fewer than two members.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs the features of at least 2 clips; there is {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of the Gaussians with these moments; for features of I3D, the FVD.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017,
    arXiv:1706.08500). The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2), which stays
    exact for singular covariances, as with fewer clips than features. The fewer clips, the higher the value
    (Chong & Forsyth 2019, arXiv:1911.07023): compare only values of equally many clips.

    Raises:
      UserError: a set has fewer than two members, or the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"one set has {a.mean.size} features, the other {b.mean.size}: use the same network")
    covariance_a, covariance_b = a.covariance, b.covariance
    product = _square_root(covariance_a) @ _square_root(covariance_b)
    overlap = np.linalg.svd(product, compute_uv=False).sum()
    distance = (
        np.square(a.mean - b.mean).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    )
    return max(float(distance), 0.0)


def _square_root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(covariance)
    noise = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return (vectors * np.sqrt(np.where(values > noise, values, 0.0))) @ vectors.T
