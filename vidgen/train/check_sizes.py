"""Checks that a task and a mesh support the sizes of video data, before a run begins."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError
from vidgen.data.buckets import training_sizes
from vidgen.parallel.processes import check_rows
from vidgen.train.options import RunOptions

__all__ = ["check_preview", "check_videos"]

CheckSize = Callable[[int, int, int], object]
"""Raises UserError for frames, height and width that are not supported."""


def check_videos(data: Any, run: RunOptions, mesh: Mesh, check_size: CheckSize) -> None:
    """Checks every size of `data`.

    Raises:
      ConfigError: a size does not fit; the message names it and the nearest valid sizes.
    """
    sizes = training_sizes(data, run.batch_size)
    paths = [f"config.data.buckets[{number}]" for number in range(len(data.buckets))] or ["config.data"]
    for where, size in zip(paths, sizes, strict=True):
        try:
            check_size(size.num_frames, size.height, size.width)
            batch_size = size.batch_size or run.batch_size
            if batch_size % run.grad_accumulation:
                raise UserError(
                    f"batch_size is {batch_size}, which run.grad_accumulation {run.grad_accumulation} does "
                    "not divide"
                )
            check_rows(batch_size, mesh, parts=run.grad_accumulation)
        except ValueError as error:
            raise ConfigError(f"{where} ({size}): {error}") from error
    if data.buckets:
        check_preview(data, check_size)


def check_preview(data: Any, check_size: CheckSize) -> None:
    """Checks the size of held-out clips, which is that of no training clip.

    Raises:
      ConfigError: it is not supported.
    """
    try:
        check_size(data.num_frames, data.height, data.width)
    except ValueError as error:
        raise ConfigError(f"config.data, whose own size is that of previews: {error}") from error
