"""Weights, the JSON beside them, LoRA files and latents."""

import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from tests.fuzz.mutate import damage_json, damage_safetensors
from tests.fuzz.target import Target
from tests.models.random_weights import random_module
from tests.models.small_vae import CONFIG as VAE
from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.tensor_files import TensorSpec, write_tensors
from vidgen.ckpt.weights import load_weights, save_weights
from vidgen.core.config import to_dict
from vidgen.core.tree import named_leaves
from vidgen.data.latents_file import LatentsInfo, load_latents, save_latents
from vidgen.models.clip import params as clip_params
from vidgen.models.clip import transformers_folder as clip_folder
from vidgen.models.clip.config import CLIPVisionConfig
from vidgen.models.clip.model import CLIPVision
from vidgen.models.dit import diffusers_folder as dit_folder
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.lora_file import load_lora, save_lora
from vidgen.models.dit.model import DiT
from vidgen.models.dit.wan_file import load_wan, save_wan
from vidgen.models.t5 import params as t5_params
from vidgen.models.t5 import transformers_folder as t5_folder
from vidgen.models.t5.config import T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.video_vae.diffusers_folder import save_diffusers
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.lora import LoRAOptions, adapted, add_low_rank
from vidgen.parallel.mesh import MeshOptions
from vidgen.pipeline.diffusers_folder import load_checkpoint
from vidgen.pipeline.importing import import_checkpoint
from vidgen.pipeline.sampling_file import read_scheduler, write_defaults
from vidgen.sampling.published import SamplingDefaults
from vidgen.train.vae_folder import load_vae, save_vae

DIT = DiTConfig(in_channels=3, model_dim=8, num_layers=2, num_heads=2, ffn_dim=8, text_dim=8, freq_dim=8)
T5 = T5Config(vocab_size=40, dim=8, num_layers=2, num_heads=2, head_dim=4, ffn_dim=8)
CLIP = CLIPVisionConfig(image_size=28, patch_size=14, dim=8, num_layers=2, num_heads=2, ffn_dim=8)
BYTES = ByteEncoderConfig(dim=8, num_layers=1, num_heads=2, ffn_dim=8, max_bytes=16, ngram_rows=8)
LORA = LoRAOptions(rank=2, alpha=4.0, targets=r"blocks\..*")

# Built once: none of what is read below changes them.
vae = functools.cache(lambda: random_module(lambda: VideoVAE(VAE, rngs=nnx.Rngs(0))))
dit = functools.cache(lambda: random_module(lambda: DiT(DIT, rngs=nnx.Rngs(0))))
mesh = functools.cache(lambda: MeshOptions().build())

TREE = {"a": {"kernel": np.ones((3, 5), np.float32)}, "b": np.arange(6, dtype=np.int32), "c": np.ones(())}


def _read_tree(folder: pathlib.Path) -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    load_weights(folder / "model.safetensors", shapes)


def _make_scaled(folder: pathlib.Path) -> None:
    tensors = {
        "a.weight": np.ones((3, 5), ml_dtypes.float8_e4m3fn),
        "a.scale_weight": np.full((1,), 0.5, np.float32),
        "b.weight": np.ones((4,), ml_dtypes.bfloat16),
        "scaled_fp8": np.zeros((2,), ml_dtypes.float8_e4m3fn),
    }
    specs = {name: TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}
    write_tensors(folder / "model.safetensors", specs, tensors.values(), metadata={"format": "pt"})


def _read_scaled(folder: pathlib.Path) -> None:
    shapes = {"a": {"weight": (3, 5)}, "b": {"weight": (4,)}}
    leaves = {name: {"weight": jax.ShapeDtypeStruct(x["weight"], np.float32)} for name, x in shapes.items()}
    load_weights(folder / "model.safetensors", leaves)


def _make_t5(folder: pathlib.Path) -> None:
    params = nnx.state(random_module(lambda: T5Encoder(T5, rngs=nnx.Rngs(0))), nnx.Param, graph=False)
    names = t5_params.transformers_names(named_leaves(params))
    save_weights(folder / "model.safetensors", params, names=names)
    values = {
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": T5.vocab_size,
        "d_model": T5.dim,
        "d_kv": T5.head_dim,
        "d_ff": T5.ffn_dim,
        "num_layers": T5.num_layers,
        "num_heads": T5.num_heads,
        "relative_attention_num_buckets": T5.num_buckets,
        "relative_attention_max_distance": T5.max_distance,
        "layer_norm_epsilon": T5.eps,
    }
    write_json(folder / "config.json", values)


def _make_clip(folder: pathlib.Path) -> None:
    params = nnx.state(random_module(lambda: CLIPVision(CLIP, rngs=nnx.Rngs(0))), nnx.Param, graph=False)
    names = clip_params.transformers_names(CLIP, named_leaves(params))
    save_weights(folder / "model.safetensors", params, names=names)
    values = {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "image_size": CLIP.image_size,
        "patch_size": CLIP.patch_size,
        "hidden_size": CLIP.dim,
        "num_hidden_layers": CLIP.num_layers,
        "num_attention_heads": CLIP.num_heads,
        "intermediate_size": CLIP.ffn_dim,
        "layer_norm_eps": CLIP.eps,
    }
    write_json(folder / "config.json", values)


def _make_checkpoint(folder: pathlib.Path) -> None:
    """As `vidgen export --format diffusers` writes one of a model that was trained here."""
    dit_folder.save_diffusers(dit(), folder / "transformer")
    save_diffusers(vae(), folder / "vae")
    text = random_module(lambda: ByteEncoder(BYTES, rngs=nnx.Rngs(0)))
    save_weights(folder / "byte_encoder" / "model.safetensors", nnx.state(text, nnx.Param, graph=False))
    write_json(folder / "byte_encoder" / "config.json", to_dict(BYTES))
    _make_scheduler(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "expand_timesteps": False,
        "boundary_ratio": None,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    write_json(folder / "model_index.json", index)
    write_defaults(folder, SamplingDefaults(num_frames=5, height=16, width=16, fps=8.0))


def _make_scheduler(folder: pathlib.Path) -> None:
    values = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 2,
        "predict_x0": True,
    }
    write_json(folder / "scheduler_config.json", values)


def _read_import(folder: pathlib.Path) -> None:
    """Into a folder that must not be there afterwards where the import fails."""
    import_checkpoint(folder, folder / "imported", mesh=mesh())


def _make_lora(folder: pathlib.Path, spelling="peft") -> None:
    made = nnx.merge(*nnx.split(dit(), graph=False))
    add_low_rank(made, LORA, rngs=nnx.Rngs(1))
    for index, linear in enumerate(adapted(made).values()):
        up = linear.low_rank.up
        up.set_value(0.3 * jax.random.normal(jax.random.key(index), up.shape))
    save_lora(made, folder / "lora.safetensors", spelling)


def _make_kohya(folder: pathlib.Path) -> None:
    """With alphas, and changes of biases."""
    tensors = {
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": np.ones((2, 8), np.float16),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": np.ones((8, 2), np.float16),
        "diffusion_model.blocks.0.ffn.0.alpha": np.float32(4),
        "diffusion_model.blocks.1.self_attn.q.lora_down.weight": np.ones((2, 8), ml_dtypes.bfloat16),
        "diffusion_model.blocks.1.self_attn.q.lora_up.weight": np.ones((8, 2), ml_dtypes.bfloat16),
        "diffusion_model.blocks.1.self_attn.q.diff_b": np.zeros((8,), np.float32),
    }
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    specs = {name: TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}
    metadata = {"ss_network_alpha": "4", "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})}
    write_tensors(folder / "lora.safetensors", specs, tensors.values(), metadata=metadata)


def _read_lora(folder: pathlib.Path) -> None:
    load_lora(nnx.merge(*nnx.split(dit(), graph=False)), folder / "lora.safetensors")


def _make_latents(folder: pathlib.Path) -> None:
    info = LatentsInfo(
        num_frames=5, height=16, width=24, fps=8.0, vae="runs/vae", spatial_factor=4, temporal_factor=2
    )
    latents = np.random.default_rng(0).normal(size=(3, 4, 6, 3)).astype(np.float32)
    save_latents(folder / "clip.safetensors", latents, info)


SAFETENSORS = {"*.safetensors": damage_safetensors}
FOLDER = {"config.json": damage_json, "*.safetensors": damage_safetensors}

TARGETS = {
    "safetensors": Target(
        make=lambda folder: save_weights(folder / "model.safetensors", TREE, metadata={"format": "pt"}),
        damaged=SAFETENSORS,
        read=_read_tree,
        donor="lora",
    ),
    "scaled": Target(make=_make_scaled, damaged=SAFETENSORS, read=_read_scaled, donor="safetensors"),
    "weight_index": Target(
        make=lambda folder: save_weights(folder / "model.safetensors", TREE, max_file_bytes=64),
        damaged={"*.index.json": damage_json, **SAFETENSORS},
        read=_read_tree,
    ),
    "vae_diffusers": Target(
        make=lambda folder: save_diffusers(vae(), folder), damaged=FOLDER, read=load_vae, donor="vae_run"
    ),
    "vae_run": Target(
        make=lambda folder: save_vae(vae(), folder),
        damaged={f"vae/{name}": how for name, how in FOLDER.items()},
        read=load_vae,
        donor="vae_diffusers",
    ),
    "dit": Target(
        make=lambda folder: dit_folder.save_diffusers(dit(), folder),
        damaged=FOLDER,
        read=lambda folder: dit_folder.load_diffusers(folder, mesh()),
        donor="vae_diffusers",
    ),
    "t5": Target(
        make=_make_t5, damaged=FOLDER, read=lambda folder: t5_folder.load_transformers(folder, mesh())
    ),
    "clip": Target(
        make=_make_clip, damaged=FOLDER, read=lambda folder: clip_folder.load_transformers(folder, mesh())
    ),
    "scheduler": Target(make=_make_scheduler, damaged={"*.json": damage_json}, read=read_scheduler),
    "checkpoint": Target(
        make=_make_checkpoint,
        damaged={
            "*.json": damage_json,
            "*/*.json": damage_json,
            "byte_encoder/*.safetensors": damage_safetensors,
        },
        read=lambda folder: load_checkpoint(folder, mesh()),
    ),
    "import": Target(
        make=_make_checkpoint,
        damaged={
            "*.json": damage_json,
            "*/*.json": damage_json,
            "*/*.safetensors": damage_safetensors,
        },
        read=_read_import,
        writes=("imported", "imported/*"),
    ),
    "wan_file": Target(
        make=lambda folder: save_wan(dit(), folder / "wan.safetensors"),
        damaged=SAFETENSORS,
        read=lambda folder: load_wan(folder / "wan.safetensors", mesh(), num_heads=2),
        donor="dit",
    ),
    "lora": Target(make=_make_lora, damaged=SAFETENSORS, read=_read_lora, donor="kohya"),
    "kohya": Target(make=_make_kohya, damaged=SAFETENSORS, read=_read_lora, donor="lora"),
    "latents": Target(
        make=_make_latents,
        damaged={"clip.json": damage_json, **SAFETENSORS},
        read=lambda folder: load_latents(folder / "clip.safetensors"),
        donor="safetensors",
    ),
}
