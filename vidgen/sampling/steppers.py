"""Integrators of the sampling ODE dx/dt = velocity, from t = 1 down to t = 0."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from vidgen.core.protocols import VelocityNetwork
from vidgen.core.typing import Array, Float, Latents, PyTree

Time = Float[Array, ""]


@runtime_checkable
class Stepper(Protocol):
    """One step of an integrator; `memory` is what it keeps between steps."""

    def init(self, latents: Latents) -> PyTree:
        """Memory before the first step."""
        ...

    def step(
        self, network: VelocityNetwork, latents: Latents, memory: PyTree, t: Time, t_next: Time
    ) -> tuple[Latents, PyTree]:
        """Latents at `t_next` < `t`, and the memory for the next step."""
        ...


def _velocity(network: VelocityNetwork, latents: Latents, t: Time) -> Latents:
    return network(latents, jnp.full(latents.shape[0], t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler:
    """First order; one network call per step."""

    kind: Literal["euler"] = "euler"

    def init(self, latents: Latents) -> PyTree:
        return ()

    def step(
        self, network: VelocityNetwork, latents: Latents, memory: PyTree, t: Time, t_next: Time
    ) -> tuple[Latents, PyTree]:
        return latents + (t_next - t) * _velocity(network, latents, t), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Second order (trapezoid); two network calls per step."""

    kind: Literal["heun"] = "heun"

    def init(self, latents: Latents) -> PyTree:
        return ()

    def step(
        self, network: VelocityNetwork, latents: Latents, memory: PyTree, t: Time, t_next: Time
    ) -> tuple[Latents, PyTree]:
        first = _velocity(network, latents, t)
        second = _velocity(network, latents + (t_next - t) * first, t_next)
        return latents + 0.5 * (t_next - t) * (first + second), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver:
    """DPM-Solver++(2M) in flow form: second order, multistep, one network call per step (arXiv 2211.01095).

    With alpha = 1 - t, sigma = t and lambda = log(alpha / sigma), it follows a clean prediction that is
    linear in lambda. The first two steps (lambda is infinite at t = 1) and the last are first order;
    the error from noise to data falls as h^2 log(1 / h).
    """

    kind: Literal["dpm_solver"] = "dpm_solver"

    def init(self, latents: Latents) -> PyTree:
        return {
            "clean": jnp.zeros_like(latents),
            "t": jnp.asarray(1.0, jnp.float32),
            "first": jnp.asarray(True),
        }

    def step(
        self, network: VelocityNetwork, latents: Latents, memory: PyTree, t: Time, t_next: Time
    ) -> tuple[Latents, PyTree]:
        clean = latents - t * _velocity(network, latents, t)
        # Half the ratio of this step in lambda to the last one: 0 after the first step, which starts at -inf.
        h, h_last = _log_snr(t_next) - _log_snr(t), _log_snr(t) - _log_snr(memory["t"])
        multistep = ~memory["first"] & (memory["t"] < 1.0) & (t_next > 0.0)
        half_ratio = jnp.where(multistep, 0.5 * h / jnp.where(multistep, h_last, 1.0), 0.0)
        direction = clean + half_ratio * (clean - memory["clean"])
        # First order is Euler's step with `clean` held: x_next = (t_next / t) x + (1 - t_next / t) clean.
        latents = (t_next / t) * latents + (1.0 - t_next / t) * direction
        return latents, {"clean": clean, "t": t, "first": jnp.asarray(False)}


def _log_snr(t: Time) -> Time:
    t = jnp.clip(t, 1e-6, 1.0 - 1e-6)
    return jnp.log1p(-t) - jnp.log(t)
