"""Shapes of a task's batch arrays, computed from data options without reading data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vidgen.data.buckets import BucketedData
from vidgen.data.latents_data import LatentsData

__all__ = ["BatchSpec", "empty_batch", "spec_of"]

BatchSpec = dict[str, jax.ShapeDtypeStruct]


def empty_batch(data: BucketedData | LatentsData) -> dict[str, Any]:
    """Host batch, as from the loader, of one black clip without a caption or one packed row without clips.

    Args:
      data: options of one size; buckets are ignored.
    """
    if isinstance(data, LatentsData):
        packing = dataclasses.asdict(data.packing)
        return {"rows": [[]]} | {name: packing[name] for name in ("tokens_per_row", "clips_per_row")}
    shape = (1, data.num_frames, data.height, data.width, 3)
    return {"video": np.broadcast_to(np.uint8(0), shape), "caption": [""], "name": [""]}


def spec_of(arrays: Mapping[str, np.ndarray], batch_size: int) -> BatchSpec:
    """Shapes and dtypes of the arrays for `batch_size` clips or packed rows."""
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in arrays.items()}
