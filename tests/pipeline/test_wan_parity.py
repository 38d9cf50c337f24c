"""The same checkpoint, noise and prompt give the same video in diffusers' pipelines and here."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import vidgen
from tests.models.tiny_tokenizer import SIZE, write_tokenizer
from vidgen.parallel.mesh import MeshOptions

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 20,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 2,
    "latents_mean": [0.1, -0.2, 0.0, 0.3],
    "latents_std": [1.0, 0.5, 2.0, 1.5],
}
TEXT = {
    "vocab_size": SIZE,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PROMPT, NEGATIVE = "Two dogs run  over a quiet lake.", "rain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A published kind of model, tiny."""

    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    vae: dict[str, Any] = dataclasses.field(default_factory=dict)
    pipeline: dict[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: str = "UniPCMultistepScheduler"
    images: int = 0
    clip: bool = False
    experts: bool = False
    size: tuple[int, int, int] = (5, 16, 16)
    steps: int = 3
    mesh: MeshOptions = MeshOptions()


GIVEN = {"in_channels": 10}
LEVELS = {
    "dim_mult": [1, 1, 1, 1],
    "temperal_downsample": [False, True, True],
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
PATCHES = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 4,
}
CLIP = {**GIVEN, "image_dim": 16, "added_kv_proj_dim": 24}
KINDS = {
    "2.1 T2V": Kind(vae=LEVELS, size=(9, 16, 32)),
    "2.1 T2V, Euler": Kind(scheduler="FlowMatchEulerDiscreteScheduler"),
    "2.1 I2V": Kind(transformer=CLIP, images=1, clip=True),
    "2.1 FLF2V": Kind(transformer={**CLIP, "pos_embed_seq_len": 10}, images=2, clip=True),
    "2.2 TI2V": Kind(vae=PATCHES, pipeline={"expand_timesteps": True}, images=1, size=(5, 16, 32)),
    "2.2 T2V A14B": Kind(pipeline={"boundary_ratio": 0.875}, experts=True, steps=5),
    "2.2 I2V A14B": Kind(
        transformer=GIVEN, pipeline={"boundary_ratio": 0.9}, images=1, experts=True, steps=4
    ),
}


def spread(module, scale=1.0):
    """Random weights that let every input be seen in the output."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or "norm" in name or "gamma" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim >= 2 and "table" not in name:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) * scale * fan**-0.5)
    return module.eval()


@pytest.fixture(scope="module", params=KINDS.items(), ids=KINDS.keys())
def made(request, tmp_path_factory):
    """The kind, diffusers' pipeline, and the folder that it saved."""
    _, kind = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    shape = {**TRANSFORMER, **kind.transformer}
    parts = {
        "vae": spread(diffusers.AutoencoderKLWan(**{**VAE, **kind.vae})),
        "text_encoder": spread(transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT))),
        "tokenizer": transformers.T5Tokenizer.from_pretrained(write_tokenizer(folder / "made")),
        "transformer": spread(diffusers.WanTransformer3DModel(**shape), 1.5),
        "scheduler": scheduler(kind.scheduler),
        **kind.pipeline,
    }
    if kind.experts:
        parts["transformer_2"] = spread(diffusers.WanTransformer3DModel(**shape), 1.5)
    if kind.images:
        parts |= {"image_encoder": None, "image_processor": None}
    if kind.clip:
        vision = transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        parts["image_encoder"] = spread(transformers.CLIPVisionModel(vision))
        parts["image_processor"] = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
    name = "WanImageToVideoPipeline" if kind.images else "WanPipeline"
    reference = getattr(diffusers, name)(**parts)
    reference.set_progress_bar_config(disable=True)
    reference.save_pretrained(folder)
    return kind, reference, folder


def scheduler(name):
    if name == "UniPCMultistepScheduler":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


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
