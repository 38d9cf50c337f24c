"""Memory of a text encoder that is not trained, which lies beside the training step."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vidgen.core.tree import named_leaves
from vidgen.models.t5.config import VARIANTS, T5Config
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.transformers_folder import HALVED, read_config
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.train.task import Task
from vidgen.train.text_features import TextFeatures

__all__ = ["encoder_bytes_of"]


def encoder_bytes_of(task: Task, mesh: Mesh) -> int:
    """Bytes of the weights of the task's text encoder on one device; 0 without one. Nothing is loaded.

    They are cut over the devices of one process. Of the encoder only `config.json` is read; where that is not
    on this machine, the encoder is taken to be Wan's, UMT5-XXL.
    """
    options = getattr(task, "text_encoder", None)
    if not isinstance(options, TextFeatures):
        return 0
    config = dataclasses.replace(_config(options), dtype=options.dtype)
    local = MeshOptions(data=1, fsdp=-1).build(_of_one_process(mesh))
    state = nnx.state(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), graph=False)
    places = jax.tree.leaves(shardings(state, local))
    total = 0
    for (name, leaf), place in zip(named_leaves(state).items(), places, strict=True):
        halved = options.dtype == "bfloat16" and re.fullmatch(HALVED, name)
        total += math.prod(place.shard_shape(leaf.shape)) * (2 if halved else leaf.dtype.itemsize)
    return total


def _config(options: TextFeatures) -> T5Config:
    folder = pathlib.Path(options.path) / "text_encoder"
    return read_config(folder) if (folder / "config.json").exists() else VARIANTS["umt5-xxl"]


def _of_one_process(mesh: Mesh) -> list[Any]:
    devices = list(np.ravel(mesh.devices))
    return [device for device in devices if device.process_index == devices[0].process_index]
