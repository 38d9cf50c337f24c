"""Shapes of a task's batch arrays, computed from data options without reading data."""

import dataclasses
from typing import Any

import jax
import numpy as np

from vidgen.core.typing import PyTree
from vidgen.data.training_data import TrainingData

__all__ = ["BatchSpec", "empty_batch", "spec_of"]

BatchSpec = PyTree[jax.ShapeDtypeStruct]


def empty_batch(data: TrainingData) -> dict[str, Any]:
    """Host batch, as from the loader, of one black clip without a caption or one packed row without clips.

    Args:
      data: options of one size; buckets are ignored.
    """
    if data.packing is not None:
        packing = dataclasses.asdict(data.packing)
        return {"rows": [[]]} | {name: packing[name] for name in ("tokens_per_row", "clips_per_row")}
    shape = (1, data.num_frames, data.height, data.width, 3)
    return {"video": np.broadcast_to(np.uint8(0), shape), "caption": [""], "name": [""]}


def spec_of(arrays: PyTree[np.ndarray], batch_size: int) -> BatchSpec:
    """Shapes and dtypes of the arrays for `batch_size` clips or packed rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), arrays)
