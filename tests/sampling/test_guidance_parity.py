"""Guidance over several steps is that of diffusers' guiders."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.sampling.guidance import AdaptiveProjected, ClassifierFree, ZeroStar

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
guiders = pytest.importorskip("diffusers.guiders", reason="needs the extra `parity`")

SCALE, TIMES = 4.5, (0.95, 0.7, 0.35)
PROJECTED = {"guidance_scale": SCALE - 1.0, "use_original_formulation": True}


def pair(kind):
    if kind == "cfg":
        return guiders.ClassifierFreeGuidance(guidance_scale=SCALE), ClassifierFree()
    if kind == "rescaled":
        theirs = guiders.ClassifierFreeGuidance(guidance_scale=SCALE, guidance_rescale=0.6)
        return theirs, ClassifierFree(rescale=0.6)
    if kind == "zero star":
        theirs = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=1)
        return theirs, ZeroStar(zero_steps=1)
    theirs = guiders.AdaptiveProjectedGuidance(
        **PROJECTED,
        adaptive_projected_guidance_momentum=-0.4,
        adaptive_projected_guidance_rescale=6.0,
        eta=0.3,
    )
    return theirs, AdaptiveProjected(eta=0.3, norm_threshold=6.0, momentum=-0.4)


@pytest.mark.parametrize("kind", ["cfg", "rescaled", "zero star", "apg"])
def test_three_steps(kind):
    theirs, ours = pair(kind)
    random = np.random.default_rng(0)
    latents = random.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    state = ours.init(jnp.asarray(latents))
    for step, t in enumerate(TIMES):
        positive, negative = (random.normal(size=latents.shape).astype(np.float32) for _ in range(2))
        found, state = ours.combine(
            jnp.asarray(positive),
            jnp.asarray(negative),
            latents=jnp.asarray(latents),
            timestep=jnp.full(2, t, jnp.float32),
            scale=SCALE,
            state=state,
            step=jnp.asarray(step),
        )
        theirs.set_state(step=step, num_inference_steps=len(TIMES), timestep=None)
        theirs.prepare_inputs({})
        if kind == "apg":
            # Of clean predictions, and back.
            clean = [torch.from_numpy(latents - np.float32(t) * v) for v in (positive, negative)]
            expected = (latents - theirs.forward(*clean).pred.numpy()) / np.float32(t)
        else:
            expected = theirs.forward(torch.from_numpy(positive), torch.from_numpy(negative)).pred.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
