"""Whole models as diffusers keeps them: model_index.json, and a folder for each part."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from vidgen.ckpt.json_files import read_json
from vidgen.models.clip import transformers_folder as clip_folder
from vidgen.models.dit import diffusers_folder as dit_folder
from vidgen.models.dit.experts import TwoExperts
from vidgen.models.t5 import transformers_folder as t5_folder
from vidgen.models.t5.prompts import FeatureCache, T5Prompts, digest
from vidgen.models.t5.tokenizer import PromptTokenizer
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae import diffusers_folder as vae_folder
from vidgen.parallel.rules import shardings
from vidgen.pipeline.pipeline import Pipeline
from vidgen.sampling.conditioning import FramesEnter, how_frames_enter
from vidgen.sampling.generate import SamplingOptions
from vidgen.sampling.steppers import AnyStepper, Euler, UniPC
from vidgen.sampling.time_grid import TimeGrid

__all__ = ["is_checkpoint", "load_checkpoint", "read_sampling"]

_INDEX = "model_index.json"
_CLASSES = ("WanPipeline", "WanImageToVideoPipeline")
_DTYPE = Literal["float32", "bfloat16"]


def is_checkpoint(folder: pathlib.Path | str) -> bool:
    """Whether a whole model of diffusers is in `folder`, of whatever kind."""
    return (pathlib.Path(folder) / _INDEX).exists()


def load_checkpoint(
    folder: pathlib.Path | str,
    mesh: Mesh,
    *,
    dtype: _DTYPE = "float32",
    cache: pathlib.Path | str | None = None,
) -> Pipeline:
    """Wan 2.1's or 2.2's model in `folder`, the VAE in float32; the text encoder follows when it is needed.

    Args:
      mesh: over which the weights are laid.
      dtype: of matrix products, in which the transformer's and the encoders' matrices are kept too.
      cache: folder for features of prompts; None keeps none.

    Raises:
      FileNotFoundError: a part is missing.
      ValueError: it is of another kind, or asks for what is not supported here.
      WeightsError: names every tensor that is missing, left over or of another shape.
    """
    folder = pathlib.Path(folder)
    index = read_json(folder / _INDEX, remedy="give the folder of a whole checkpoint of Wan for diffusers")
    if index.get("_class_name") not in _CLASSES:
        raise ValueError(
            f"{folder / _INDEX} is of {index.get('_class_name')!r}; expected one of {', '.join(_CLASSES)}"
        )
    options = read_sampling(folder / "scheduler")
    model = TextToVideo(_transformers(folder, index, mesh, dtype))
    vae = vae_folder.load_diffusers(folder / "vae")
    has_encoder = (index.get("image_encoder") or [None])[0] is not None
    large = vae.config.spatial_factor == 16  # Wan 2.2's TI2V, which is trained at 24 frames per second.
    return Pipeline(
        model,
        jax.device_put(vae, shardings(vae, mesh)),
        _prompts(folder, mesh, dtype, cache),
        size=(121, 704, 1280) if large else (81, 480, 832),
        fps=24.0 if large else 16.0,
        mesh=mesh,
        options=options,
        images=_images(model, vae.config.latent_channels, vae.config.temporal_factor, index),
        image_encoder=clip_folder.load_transformers(folder / "image_encoder", mesh, dtype=dtype)
        if has_encoder
        else None,
    )


def read_sampling(folder: pathlib.Path | str) -> SamplingOptions:
    """How a model is sampled by the scheduler that is kept with it.

    Raises:
      FileNotFoundError: it has no configuration.
      ValueError: the scheduler, or an option of it, is not supported.
    """
    path = pathlib.Path(folder) / "scheduler_config.json"
    values = read_json(path, remedy="give the folder `scheduler` of a checkpoint of Wan")
    kinds: dict[str, tuple[AnyStepper, Literal["unipc", "flow_match_euler"], str, dict[str, Any]]] = {
        "UniPCMultistepScheduler": (
            UniPC(),
            "unipc",
            "flow_shift",
            {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "solver_order": 2,
                "solver_type": "bh2",
                "predict_x0": True,
                "lower_order_final": True,
                "thresholding": False,
                "use_dynamic_shifting": False,
            },
        ),
        "FlowMatchEulerDiscreteScheduler": (
            Euler(),
            "flow_match_euler",
            "shift",
            {"use_dynamic_shifting": False, "stochastic_sampling": False, "invert_sigmas": False},
        ),
    }
    kind = values.get("_class_name")
    if kind not in kinds:
        raise ValueError(f"{path}: scheduler {kind!r} is not supported; expected one of {', '.join(kinds)}")
    stepper, convention, shift, expected = kinds[kind]
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name}={values[name]!r} is not supported; expected {value!r}")
    return SamplingOptions(
        grid=TimeGrid(num_steps=50, shift=float(values.get(shift, 1.0)), convention=convention),
        stepper=stepper,
        guidance_scale=5.0,
    )


def _transformers(
    folder: pathlib.Path, index: Mapping[str, Any], mesh: Mesh, dtype: _DTYPE
) -> dit_folder.DiT | TwoExperts:
    load = functools.partial(dit_folder.load_diffusers, mesh=mesh, dtype=dtype)
    if (index.get("transformer_2") or [None])[0] is None:
        return load(folder / "transformer")
    boundary = index.get("boundary_ratio")
    if boundary is None:
        raise ValueError(f"{folder / _INDEX} has transformer_2, but no boundary_ratio between the two")
    return TwoExperts(load(folder / "transformer"), load(folder / "transformer_2"), float(boundary))


def _prompts(folder: pathlib.Path, mesh: Mesh, dtype: _DTYPE, cache: pathlib.Path | str | None) -> T5Prompts:
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    kept = None
    if cache is not None:
        files = [*encoder.glob("*.json"), *encoder.glob("*.safetensors"), *tokenizer.glob("*.*")]
        kept = FeatureCache(cache, digest(files, dtype))
    t5_folder.read_config(encoder)  # What is missing is found before prompts come.
    load = functools.partial(t5_folder.load_transformers, encoder, mesh, dtype=dtype)
    return T5Prompts(load, PromptTokenizer(tokenizer), cache=kept)


def _images(
    model: TextToVideo, latent_channels: int, temporal_factor: int, index: Mapping[str, Any]
) -> FramesEnter | None:
    enter = how_frames_enter(model.dit.config, latent_channels, temporal_factor)
    # A timestep for each token, with which Wan 2.2's TI2V was trained, the others not.
    return None if enter == "first" and not index.get("expand_timesteps") else enter
