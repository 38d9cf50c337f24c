"""Integrators of the sampling ODE dx/dt = velocity, from t = 1 down to t = 0."""

import dataclasses
from collections.abc import Generator
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp

from vidgen.core.typing import Array, Float, Noisy, PyTree

Time = Float[Array, ""]

Evaluations: TypeAlias = Generator[tuple[Noisy, Time], Noisy, tuple[Noisy, PyTree]]
"""A step as a generator: yields the points (latents, timestep) at which it needs the velocity, is sent each
velocity, and returns the latents after the step and the state for the next one."""


@runtime_checkable
class Stepper(Protocol):
    """One step of an integrator; its state is passed to the next step."""

    def init(self, latents: Noisy) -> PyTree:
        """State before the first step."""
        ...

    def step(self, latents: Noisy, state: PyTree, t: Time, t_next: Time) -> Evaluations:
        """Evaluations of a step from `t` to `t_next` < `t`, each at one of these two."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler:
    """First order; one network call per step."""

    kind: Literal["euler"] = "euler"

    def init(self, latents: Noisy) -> PyTree:
        return ()

    def step(self, latents: Noisy, state: PyTree, t: Time, t_next: Time) -> Evaluations:
        velocity = yield latents, t
        return latents + (t_next - t) * velocity, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Second order (trapezoid); two network calls per step."""

    kind: Literal["heun"] = "heun"

    def init(self, latents: Noisy) -> PyTree:
        return ()

    def step(self, latents: Noisy, state: PyTree, t: Time, t_next: Time) -> Evaluations:
        first = yield latents, t
        second = yield latents + (t_next - t) * first, t_next
        return latents + 0.5 * (t_next - t) * (first + second), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver:
    """DPM-Solver++(2M) in flow form: second order, multistep, one network call per step (arXiv 2211.01095).

    With alpha = 1 - t, sigma = t and lambda = log(alpha / sigma), it assumes that the clean prediction is
    linear in lambda. The first two steps (lambda is infinite at t = 1) and the last step are first order. The
    error from noise to data falls as h^2 log(1 / h).
    """

    kind: Literal["dpm_solver"] = "dpm_solver"

    def init(self, latents: Noisy) -> PyTree:
        return {
            "clean": jnp.zeros_like(latents),
            "t": jnp.asarray(1.0, jnp.float32),
            "first": jnp.asarray(True),
        }

    def step(self, latents: Noisy, state: PyTree, t: Time, t_next: Time) -> Evaluations:
        velocity = yield latents, t
        clean = latents - t * velocity
        # half_ratio is 0 after the first step, which starts at lambda = -inf.
        h, h_last = _log_snr(t_next) - _log_snr(t), _log_snr(t) - _log_snr(state["t"])
        multistep = ~state["first"] & (state["t"] < 1.0) & (t_next > 0.0)
        half_ratio = jnp.where(multistep, 0.5 * h / jnp.where(multistep, h_last, 1.0), 0.0)
        direction = clean + half_ratio * (clean - state["clean"])
        # A first-order step holds `clean` constant: x_next = (t_next / t) x + (1 - t_next / t) clean.
        latents = (t_next / t) * latents + (1.0 - t_next / t) * direction
        return latents, {"clean": clean, "t": t, "first": jnp.asarray(False)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC:
    """Second-order UniPC in its B2(h) form, on clean predictions: one network call per step.

    Each call first corrects the previous step, then predicts the next one (arXiv 2302.04867). The first and
    the last step are first order, as in diffusers and in Wan's own sampler. The grid must begin below t = 1
    (`TimeGrid.convention`), where the log signal-to-noise ratio is finite.
    """

    kind: Literal["unipc"] = "unipc"

    def init(self, latents: Noisy) -> PyTree:
        return {
            # Noisy at the start of the last step; clean predictions there and one step earlier.
            "latents": jnp.zeros_like(latents),
            "clean": (jnp.zeros_like(latents), jnp.zeros_like(latents)),
            "t": (jnp.ones((), jnp.float32), jnp.ones((), jnp.float32)),
            "count": jnp.zeros((), jnp.int32),
        }

    def step(self, latents: Noisy, state: PyTree, t: Time, t_next: Time) -> Evaluations:
        (last, _), (t_last, _), count = state["clean"], state["t"], state["count"]
        velocity = yield latents, t
        clean = latents - t * velocity
        corrected = self._corrected(state, clean, t)
        latents = jnp.where(count > 0, corrected, latents)

        h = _log_snr(t_next) - _log_snr(t)
        second = (count > 0) & (t_next > 0.0)
        ratio = jnp.where(second, (_log_snr(t_last) - _log_snr(t)) / h, 1.0)
        slope = jnp.where(second, 0.5 * (last - clean) / ratio, 0.0)
        return _exponential(latents, clean, slope, t, t_next), {
            "latents": latents,
            "clean": (clean, last),
            "t": (t, t_last),
            "count": count + 1,
        }

    def _corrected(self, state: PyTree, clean: Noisy, t: Time) -> Noisy:
        """Recomputes the latents at `t` with the clean prediction `clean` at `t`."""
        (last, before), (t_last, t_before) = state["clean"], state["t"]
        h = _log_snr(t) - _log_snr(t_last)
        phi_1 = jnp.expm1(-h)
        phi_2 = phi_1 / -h - 1.0
        phi_3 = phi_2 / -h - 0.5
        first, second = phi_2 / phi_1, 2.0 * phi_3 / phi_1
        # The step to correct is second order from the second step on.
        is_second = state["count"] > 1
        ratio = jnp.where(is_second, (_log_snr(t_before) - _log_snr(t_last)) / h, -1.0)
        of_before = jnp.where(is_second, (second - first) / (ratio - 1.0), 0.0)
        of_here = jnp.where(is_second, first - of_before, 0.5)
        slope = of_before * (before - last) / ratio + of_here * (clean - last)
        return _exponential(state["latents"], last, slope, t_last, t)


def _exponential(latents: Noisy, clean: Noisy, slope: Noisy, t: Time, t_next: Time) -> Noisy:
    """Exponential integrator from `t` to `t_next` with the clean prediction `clean + slope`."""
    # e^-h - 1, written with signal-to-noise ratios instead of logarithms, so that it is -1 at t_next = 0.
    phi_1 = (1.0 - t) * t_next / ((1.0 - t_next) * t) - 1.0
    return (t_next / t) * latents - (1.0 - t_next) * phi_1 * (clean + slope)


def _log_snr(t: Time) -> Time:
    t = jnp.clip(t, 1e-6, 1.0 - 1e-6)
    return jnp.log1p(-t) - jnp.log(t)


AnyStepper = Euler | Heun | DPMSolver | UniPC | Stepper

STEPPERS: dict[str, AnyStepper] = {
    stepper.kind: stepper for stepper in (DPMSolver(), UniPC(), Heun(), Euler())
}
"""Steppers by name."""
