"""Checks of packed latents: tokens of each clip, and whether a run can train on them."""

from collections.abc import Sequence

from jax.sharding import Mesh

from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError
from vidgen.data.latents_data import LatentsData
from vidgen.data.latents_records import LatentRecords
from vidgen.data.source import BrokenClip
from vidgen.models.dit.config import DiTConfig
from vidgen.parallel.processes import check_rows
from vidgen.train.task import Task
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import encoder_fingerprint, load_vae

__all__ = ["check_latents", "token_counts"]


def token_counts(records: LatentRecords, dit: DiTConfig) -> list[int]:
    """Number of tokens of each clip.

    Raises:
      UserError: the latents of a clip do not divide into patches; the message names it.
    """
    known: dict[tuple[int, int, int], int] = {}
    for index, size in enumerate(records.sizes):
        if size not in known:
            try:
                t, h, w = dit.token_grid(*records.info.latent_size(*size))
            except ValueError as error:
                raise UserError(f"{_describe(records, index)}: {error}") from error
            known[size] = t * h * w
    return [known[size] for size in records.sizes]


def check_latents(data: LatentsData, task: Task, batch_size: int, parts: int, mesh: Mesh) -> None:
    """Checks that a run can be trained on these latents, before it begins.

    Args:
      batch_size: packed rows per step.
      parts: micro-batches per step.

    Raises:
      ConfigError: the task takes no latents; they come from another VAE than the task's, or have sizes that
        the transformer does not support; a clip is longer than a packed row; or packed rows do not divide
        over the mesh.
    """
    if not isinstance(task, TextToVideoTask):
        raise ConfigError("config.data.kind is latents, on which only a task of text_to_video is trained")
    for conditioner in task.conditioners:
        if conditioner.needs_video:
            raise ConfigError(
                f"config.data.kind is latents, and {conditioner} in config.task.conditioners needs videos: "
                "leave it out, or train on data of one size"
            )
    records = data.source()
    if records.info.channels != task.dit.in_channels:
        raise ConfigError(
            f"config.data.path: latents of {records.info.channels} channels, and config.task.dit.in_channels "
            f"is {task.dit.in_channels}"
        )
    try:
        check_rows(batch_size, mesh, "rows", parts=parts)
        task.check_size(data.num_frames, data.height, data.width)
        counts = token_counts(records, task.dit)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error
    if encoder_fingerprint(load_vae(task.vae)) != records.info.encoder:
        raise ConfigError(
            f"config.data.path: {data.path} was encoded by {records.info.vae}, which is another VAE than "
            f"config.task.vae {task.vae}: give that one, or encode the clips with this one"
        )
    _check_rows(data, records, counts, mesh.shape["context"])


def _check_rows(data: LatentsData, records: LatentRecords, counts: Sequence[int], ways: int) -> None:
    tokens = data.packing.tokens_per_row
    longest = max(range(len(counts)), key=counts.__getitem__)
    if counts[longest] > tokens:
        needed = -(-counts[longest] // ways) * ways
        raise ConfigError(
            f"config.data.packing.tokens_per_row is {tokens}, and {_describe(records, longest)} has "
            f"{counts[longest]} tokens: set it to {needed} or more"
        )
    if tokens % ways:
        raise ConfigError(
            f"config.data.packing.tokens_per_row is {tokens}, which the mesh's context {ways} does not "
            f"divide: set it to {-(-tokens // ways) * ways}"
        )


def _describe(records: LatentRecords, index: int) -> str:
    try:
        name = records[index]["name"]
    except BrokenClip as error:
        name = error.name
    frames, height, width = records.sizes[index]
    return f"the clip {name} ({frames} x {height} x {width})"
