"""Power-law averages of the weights, and averages of any other width solved from two (arXiv 2312.02696).

The average of exponent g after t updates weights the parameters at time s in [0, t] by (g + 1) s^g / t^(g +
1), so its length grows with training. `sigma_rel` is its width: the standard deviation of s, divided by t.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vidgen.core.errors import UserError
from vidgen.core.typing import Float, PyTree

__all__ = ["Averaged", "PowerLaw", "averaging", "exponent", "solve_weights"]

_WIDEST = 12.0**-0.5
"""Width of the uniform average, whose exponent is 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Power-law averages in addition to the EMA: each takes the memory and disk space of the weights.

    Attributes:
      sigma_rels: widths of the averages; snapshots of two widths give the averages of all others.
      every: steps between snapshots.
    """

    sigma_rels: tuple[float, ...] = (0.05, 0.10)
    every: int = 1000

    def __post_init__(self):
        if len(set(self.sigma_rels)) != len(self.sigma_rels) or not self.sigma_rels:
            raise UserError(f"sigma_rels={self.sigma_rels}: give different widths, such as (0.05, 0.1)")
        for sigma_rel in self.sigma_rels:
            exponent(sigma_rel)
        if self.every < 1:
            raise UserError(f"every={self.every}: it must be at least 1")

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a run of `num_steps` takes a snapshot after `step`."""
        return step % self.every == 0 or step == num_steps


class Averaged(NamedTuple):
    """Optimizer state with averages of the weights.

    Attributes:
      inner: state of the wrapped optimizer.
      count: int32 [], updates averaged.
      averages: one for each width; like the parameters, float32.
    """

    inner: Any
    count: Any
    averages: tuple[Any, ...]


def averaging(
    tx: optax.GradientTransformationExtraArgs, options: PowerLaw | None
) -> optax.GradientTransformationExtraArgs:
    """Wraps `tx` to average the weights after each update; returns `tx` itself if `options` is None."""
    if options is None:
        return tx
    exponents = [exponent(sigma_rel) for sigma_rel in options.sigma_rels]

    def init(params: PyTree) -> Averaged:
        averages = tuple(jax.tree.map(jnp.copy, params) for _ in exponents)
        return Averaged(tx.init(params), jnp.zeros((), jnp.int32), averages)

    def update(updates: PyTree, state: Any, params: Any = None, **extra: Any) -> tuple[PyTree, Averaged]:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        new = optax.apply_updates(params, updates)
        count = state.count + 1
        averages = []
        for power, average in zip(exponents, state.averages, strict=True):
            # 1 - (1 - 1 / t)^(g + 1), without cancellation; 1 at the first update.
            share = -jnp.expm1((power + 1.0) * jnp.log1p(-1.0 / count))
            averages.append(jax.tree.map(lambda a, p, share=share: a + (p - a) * share, average, new))
        return updates, Averaged(inner, count, tuple(averages))

    return optax.GradientTransformationExtraArgs(init, update)


def exponent(sigma_rel: float) -> float:
    """Exponent of the profile with width `sigma_rel`.

    Raises:
      UserError: no profile has this width.
    """
    if not 0.0 < sigma_rel < _WIDEST:
        raise UserError(f"sigma_rel={sigma_rel}: widths of averages are above 0 and below {_WIDEST:.4f}")
    # sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3))
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def solve_weights(profiles: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> Float[np.ndarray, "i"]:
    """Weights of stored averages whose sum approximates a target average: least squares between profiles.

    Args:
      profiles: (updates, exponent) of each stored average.
      wanted: (updates, exponent) of the target, not later than the newest stored average.
    """
    times, powers = np.asarray(profiles, np.float64).T
    time, power = (np.asarray([x], np.float64) for x in wanted)
    gram = _inner(times, powers, times, powers)
    return np.linalg.lstsq(gram, _inner(times, powers, time, power)[:, 0], rcond=None)[0]


def _inner(
    times: np.ndarray, powers: np.ndarray, other_times: np.ndarray, other_powers: np.ndarray
) -> Float[np.ndarray, "i j"]:
    """Inner products (integrals) of profiles, each 0 after its time."""
    t, g, u, h = times[:, None], powers[:, None], other_times[None], other_powers[None]
    end = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (end / t) ** g * (end / u) ** h * end / (t * u)
