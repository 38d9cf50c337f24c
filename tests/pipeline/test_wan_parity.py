"""The same checkpoint, noise and prompt give the same video in diffusers' pipelines and here."""

import jax
import numpy as np
import pytest
from PIL import Image

import vidgen
from tests.pipeline.tiny_wan import KINDS, make_checkpoint
from vidgen.parallel.mesh import MeshOptions

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

PROMPT, NEGATIVE = "Two dogs run  over a quiet lake.", "rain"


SLOW = ("2.1 T2V, Euler", "2.2 T2V A14B")
"""Euler's method is compared with diffusers' by itself; the other A14B has two transformers as well."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=[pytest.mark.slow] if name in SLOW else [], id=name)
        for name, kind in KINDS.items()
    ],
)
def made(request, tmp_path_factory):
    """The kind, diffusers' pipeline, and the folder that it saved."""
    kind = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    return kind, make_checkpoint(kind, folder), folder


@pytest.fixture(scope="module")
def inputs(made):
    kind, reference, _ = made
    rng = np.random.default_rng(0)
    frames, height, width = kind.size
    factor, frame_factor = reference.vae_scale_factor_spatial, reference.vae_scale_factor_temporal
    shape = (1, 1 + (frames - 1) // frame_factor, height // factor, width // factor, 4)
    noise = rng.normal(size=shape)
    images = [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(kind.images)]
    return noise.astype(np.float32), dict(zip(("image", "last_image"), images, strict=False))


def test_the_video_is_that_of_diffusers(made, inputs):
    kind, reference, folder = made
    noise, images = inputs
    frames, height, width = kind.size
    call = {"height": height, "width": width, "num_frames": frames, "guidance_scale": 4.0}
    expected = reference(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        num_inference_steps=kind.steps,
        output_type="np",
        **{name: Image.fromarray(image) for name, image in images.items()},
        **call,
    ).frames[0]
    pipe = vidgen.load(folder, mesh=kind.mesh.build(jax.devices()[: 1 if kind.mesh == MeshOptions() else 4]))
    found = pipe(PROMPT, negative_prompt=NEGATIVE, noise=noise, steps=kind.steps, **images, **call)
    assert expected.std() > 0.1 and found.shape == expected.shape
    assert np.abs(found / 255.0 - expected).max() <= 2 / 255
