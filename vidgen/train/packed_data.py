"""Packed latents: tokens of each clip, the loader, and whether a run can train on them."""

import functools
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError
from vidgen.data.latents_data import LatentsData
from vidgen.data.latents_records import LatentRecords
from vidgen.data.packing import PackedLoader
from vidgen.data.source import BrokenClip
from vidgen.models.dit.config import DiTConfig
from vidgen.parallel.processes import check_rows
from vidgen.train.options import RunOptions
from vidgen.train.vae_folder import encoder_fingerprint, load_vae

__all__ = ["check_latents", "packed_loader", "token_counts"]


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


def packed_loader(data: LatentsData, dit: DiTConfig) -> Callable[..., PackedLoader]:
    """Opens latents; returns `PackedLoader` for further options.

    Raises:
      UserError: as in `token_counts`.
    """
    records = data.source()
    return functools.partial(PackedLoader, records, token_counts(records, dit), data.packing)


def check_latents(
    data: LatentsData,
    dit: DiTConfig,
    vae: str,
    run: RunOptions,
    mesh: Mesh,
) -> None:
    """Checks that a transformer can be trained on these latents, before a run begins.

    Args:
      vae: folder of the run's VAE.

    Raises:
      ConfigError: the latents come from another VAE than the task's, or have sizes that the transformer does
        not support; a clip is longer than a packed row; or packed rows do not divide over the mesh.
    """
    records = data.source()
    if records.info.channels != dit.velocity_channels:
        raise ConfigError(
            f"config.data.path: latents of {records.info.channels} channels, and the transformer of "
            f"config.task.dit takes {dit.velocity_channels}"
        )
    try:
        check_rows(run.batch_size, mesh, "rows", parts=run.grad_accumulation)
        counts = token_counts(records, dit)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error
    if encoder_fingerprint(load_vae(vae)) != records.info.encoder:
        raise ConfigError(
            f"config.data.path: {data.path} was encoded by {records.info.vae}, which is another VAE than "
            f"config.task.vae {vae}: give that one, or encode the clips with this one"
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
