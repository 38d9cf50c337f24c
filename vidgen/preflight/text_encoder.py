"""Memory of a frozen text encoder, which is resident during training."""

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
from vidgen.models.t5.transformers_folder import BF16_PATTERN, read_config
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.train.text_features import TextFeatures

__all__ = ["encoder_bytes_of"]


def encoder_bytes_of(options: TextFeatures | None, mesh: Mesh) -> int:
    """Bytes of a text encoder's weights on one device; 0 without a text encoder.

    The weights are sharded over the devices of one process. Only the encoder's `config.json` is read; if it
    is not on this machine, Wan's UMT5-XXL is assumed.
    """
    if options is None:
        return 0
    config = dataclasses.replace(_config(options), dtype=options.dtype)
    local = MeshOptions(data=1, fsdp=-1).build(_first_process_devices(mesh))
    state = nnx.state(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), graph=False)
    leaf_shardings = jax.tree.leaves(shardings(state, local))
    total = 0
    for (name, leaf), sharding in zip(named_leaves(state).items(), leaf_shardings, strict=True):
        is_bf16 = options.dtype == "bfloat16" and re.fullmatch(BF16_PATTERN, name)
        total += math.prod(sharding.shard_shape(leaf.shape)) * (2 if is_bf16 else leaf.dtype.itemsize)
    return total


def _config(options: TextFeatures) -> T5Config:
    folder = pathlib.Path(options.path) / "text_encoder"
    return read_config(folder) if (folder / "config.json").exists() else VARIANTS["umt5-xxl"]


def _first_process_devices(mesh: Mesh) -> list[Any]:
    devices = list(np.ravel(mesh.devices))
    return [device for device in devices if device.process_index == devices[0].process_index]
