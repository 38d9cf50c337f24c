"""Adversary of a video VAE: a discriminator, its losses, and their start and weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Int, Metrics, PyTree, Video
from vidgen.models.discriminator.config import DiscriminatorConfig
from vidgen.models.discriminator.model import Discriminator
from vidgen.nn.variables import Buffer
from vidgen.train.optimizer import AdamW, Muon

__all__ = ["Adversary", "hinge", "lecam", "r1", "with_gradient"]

_LARGEST_RATIO = 1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary:
    """A discriminator with hinge loss, in addition to the reconstruction losses (VQGAN, arXiv:2012.09841).

    The generator's and the discriminator's losses are one sum: the first treats the discriminator's weights
    as constants, the second the reconstruction, so one backward pass gives each network the gradient of its
    loss.

    Attributes:
      optimizer: optimizer of the discriminator; its warm-up begins at `start_step`.
      start_step: first step with a discriminator loss; before it the discriminator is neither computed nor
        trained.
      weight: weight of the generator's term.
      adaptive: `weight` is a fraction of the gradient of the reconstruction losses: the term is multiplied by
        the ratio of the gradient norms with respect to the reconstruction, at most 1e4. VQGAN takes them with
        respect to the decoder's last layer, at the cost of two more passes through it; at its output both
        gradients are available, and both backpropagate through the same decoder.
      r1_weight: weight of the gradient penalty `r1`.
      lecam_weight: weight of the regularizer `lecam`.
      lecam_decay: decay of the moving averages of logits in `lecam`.
    """

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: AdamW | Muon = AdamW(learning_rate=1e-4, b1=0.5, b2=0.9, weight_decay=0.0)
    start_step: int = 0
    weight: float = 0.1
    adaptive: bool = True
    r1_weight: float = 0.0
    lecam_weight: float = 0.0
    lecam_decay: float = 0.99

    def __post_init__(self):
        for name in ("start_step", "weight", "r1_weight", "lecam_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if not 0 <= self.lecam_decay < 1:
            raise UserError(f"lecam_decay is {self.lecam_decay}: it must be in [0, 1)")

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """Discriminator's optimizer for a run of `num_steps`; no updates before `start_step`."""
        rule = self.optimizer.transformation(max(num_steps - self.start_step, 1))
        if not self.start_step:
            return rule
        started = lambda step, **_: jnp.greater_equal(step, self.start_step)  # noqa: E731
        return optax.transforms.conditionally_mask(rule, started)

    def loss(
        self,
        discriminator: Discriminator,
        video: Video,
        reconstruction: Video,
        gradient: Video,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Sum of the generator's and the discriminator's losses, and metrics; 0 before `start_step`.

        Updates the moving averages in `discriminator`.

        Args:
          video, reconstruction: pixels in [-1, 1], of equal shape.
          gradient: gradient of the reconstruction losses with respect to `reconstruction`.
          step: steps done.
        """
        if not self.start_step:
            return self._loss(discriminator, video, reconstruction, gradient)

        def active(discriminator: Discriminator, *arrays: Array) -> tuple[Array, Metrics, PyTree]:
            loss, metrics = self._loss(discriminator, *arrays)
            return loss, metrics, nnx.state(discriminator, Buffer, graph=False)

        def inactive(discriminator: Discriminator, *arrays: Array) -> tuple[Array, Metrics, PyTree]:
            loss, metrics, _ = jax.eval_shape(active, discriminator, *arrays)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics))
            return *zeros, nnx.state(discriminator, Buffer, graph=False)

        operands = (discriminator, video, reconstruction, gradient)
        loss, metrics, buffers = jax.lax.cond(step >= self.start_step, active, inactive, *operands)
        nnx.update(discriminator, buffers)
        return loss, metrics

    def _loss(
        self, discriminator: Discriminator, video: Video, reconstruction: Video, gradient: Video
    ) -> tuple[Float[Array, ""], Metrics]:
        constant = jax.lax.stop_gradient(discriminator)
        generator, _, generator_gradient = with_gradient(
            lambda made: (-constant(made).mean(), {}), reconstruction
        )
        ratio = _ratio(gradient, generator_gradient) if self.adaptive else jnp.ones(())
        real, fake = discriminator(video), discriminator(jax.lax.stop_gradient(reconstruction))
        loss = self.weight * ratio * generator + hinge(real, fake)
        metrics = {
            "gan/discriminator": hinge(real, fake),
            "gan/real_logit": real.mean(),
            "gan/fake_logit": fake.mean(),
            "gan/ratio": ratio,
        }
        if self.r1_weight:
            metrics["gan/r1"] = r1(discriminator, video)
            loss += 0.5 * self.r1_weight * metrics["gan/r1"]
        if self.lecam_weight:
            means = jax.lax.stop_gradient((real.mean(), fake.mean()))
            discriminator.update_averages(*means, self.lecam_decay)
            averages = discriminator.real_logit[...], discriminator.fake_logit[...]
            metrics["gan/lecam"] = lecam(real, fake, *averages)
            loss += self.lecam_weight * metrics["gan/lecam"]
        return loss, metrics


def hinge(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Discriminator's loss: half the mean shortfall of real logits from 1 and of fake logits from -1."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def r1(discriminator: Discriminator, video: Video) -> Float[Array, ""]:
    """Squared gradient norm of a real clip's summed logits, per logit; mean over clips.

    A zero-centred gradient penalty (Mescheder et al., arXiv:1801.04406; it enters the loss with half its
    weight), computed exactly by differentiating twice: the discriminator is small compared with the VAE, and
    a finite difference (as in arXiv:2501.08316) needs a step size and adds variance. Divided by the number of
    logits, so that a weight means the same for clips of any size.
    """
    gradient = jax.grad(lambda x: discriminator(x).sum())(video)
    logits = jax.eval_shape(discriminator, video)
    return jnp.square(gradient).sum() / logits.size


def lecam(
    real: Float[Array, "..."],
    fake: Float[Array, "..."],
    real_average: Float[Array, ""],
    fake_average: Float[Array, ""],
) -> Float[Array, ""]:
    """Mean squared distance of the logits to the moving average of the other class (arXiv:2104.03310)."""
    return jnp.square(real - fake_average).mean() + jnp.square(fake - real_average).mean()


def with_gradient(
    function: Callable[[Array], tuple[Float[Array, ""], Metrics]], x: Float[Array, "..."]
) -> tuple[Float[Array, ""], Metrics, Float[Array, "..."]]:
    """Value and metrics of `function(x)`, and the value's gradient with respect to `x`.

    Backpropagation from the value passes this gradient to the inputs of `x`, but to nothing else that
    `function` uses; `function` is differentiated once, however often value and gradient are used.
    """
    still = jax.lax.stop_gradient(x)
    found = jax.value_and_grad(function, has_aux=True)(still)
    (value, metrics), gradient = jax.lax.stop_gradient(found)
    return value + (gradient * (x - still)).sum(), metrics, gradient


def _ratio(wanted: Array, found: Array) -> Float[Array, ""]:
    """Norm of the gradient `wanted` in units of the norm of `found`, at most 1e4."""
    norm, unit = (jnp.sqrt(jnp.square(gradient).sum()) for gradient in (wanted, found))
    return jnp.clip(norm / jnp.maximum(unit, 1e-30), 0.0, _LARGEST_RATIO)
