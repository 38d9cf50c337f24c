"""Loads a model from its folder."""

import dataclasses
import pathlib
from typing import Literal

import jax
from jax.sharding import Mesh

from vidgen.core.errors import UserError
from vidgen.core.paths import local_path
from vidgen.core.user_classes import trusting
from vidgen.models.text_to_video import TextToVideo
from vidgen.nn.lora import merge_low_rank
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.pipeline.diffusers_folder import is_checkpoint, load_checkpoint
from vidgen.pipeline.pipeline import Pipeline
from vidgen.train.restore import load_run
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import load_vae

__all__ = ["load"]


def load(
    path: pathlib.Path | str,
    *,
    mesh: Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    cache: pathlib.Path | str | None = None,
    trust: bool = False,
) -> Pipeline:
    """Loads a pipeline from the workdir of a text-to-video training run, or from a checkpoint of Wan.

    Args:
      path: a workdir; or a folder in diffusers' layout, with model_index.json, as published for Wan's models
        and as written by `vidgen import` and `vidgen export`.
      mesh: the weights are sharded over it; by default they are replicated on all devices.
      dtype: of matrix products; None is the dtype of training, and float32 for a checkpoint. bfloat16 also
        stores the matrices of a checkpoint in bfloat16.
      cache: folder that caches prompt features of a large text encoder across calls and programs; None is
        the run's folder, and no cache for a checkpoint.
      trust: imports the classes of its author that the run names, which executes their code.

    Raises:
      FileNotFoundError: the folder or a part of it is missing.
      UserError: the run trained something else, or the checkpoint is of another model.
    """
    path = local_path(path, "the checkpoint")
    mesh = MeshOptions().build() if mesh is None else mesh
    with trusting(trust):
        if is_checkpoint(path):
            return load_checkpoint(path, mesh, dtype=dtype or "float32", cache=cache)
        return _load_run(path, mesh, dtype, cache)


def _load_run(
    path: pathlib.Path,
    mesh: Mesh,
    dtype: Literal["float32", "bfloat16"] | None,
    cache: pathlib.Path | str | None,
) -> Pipeline:
    experiment, _, model = load_run(path, mesh, dtype=dtype)
    if not isinstance(model, TextToVideo):
        raise UserError(
            f"{path} is a run of kind {experiment.task.kind!r}; "
            "give one of kind 'text_to_video' (experiments/dit)"
        )
    vae = load_vae(path)
    data, task = experiment.data, experiment.task
    assert isinstance(task, TextToVideoTask)
    if cache is not None and task.text_encoder is not None:
        task = dataclasses.replace(
            task, text_encoder=dataclasses.replace(task.text_encoder, cache=str(cache))
        )
    merge_low_rank(model)
    return Pipeline(
        model,
        jax.device_put(vae, shardings(vae, mesh)),
        task.all_conditioners,
        size=(data.num_frames, data.height, data.width),
        fps=data.fps,
        mesh=mesh,
        options=task.sampling_options(),
    )
