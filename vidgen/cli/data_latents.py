"""`vidgen data latents`: encodes the clips of an experiment, for training on packed clips of any size."""

import argparse
import collections
import sys
from collections.abc import Sequence

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.paths import path_option

__all__ = ["add_latents_options", "write_latents"]


def add_latents_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vidgen data latents`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="the experiment whose clips are encoded; each of its buckets is one clip size",
    )
    parser.add_argument(
        "--vae",
        type=path_option,
        required=True,
        metavar="WORKDIR",
        help="workdir of a run that trained or used the VAE",
    )
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--num-clips",
        type=int,
        help="clips over all buckets, divided by the buckets' weights as training steps are (default: all)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="clips encoded at a time (default 16)")


def write_latents(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs `vidgen data latents`.

    Args:
      overrides: `--config.section.key=value` arguments.
    """
    if options.num_clips is not None:
        limits.COUNT.check(options.num_clips, "--num-clips")
    limits.BATCH_SIZE.check(options.batch_size, "--batch-size")
    if options.out.exists():
        raise UserError(f"--out {options.out} is there already; remove it or choose another folder")
    check_target(options.out, folder=True)

    from tqdm import tqdm

    from vidgen.cli.overrides import load_config
    from vidgen.core.config import resolve
    from vidgen.data.latents_records import RecordsInfo, write_latent_records
    from vidgen.parallel.mesh import MeshOptions
    from vidgen.train.encode_clips import choose_clips, encode_clips
    from vidgen.train.experiment import Experiment
    from vidgen.train.vae_folder import encoder_fingerprint, load_vae

    experiment = resolve(Experiment, load_config(options.config, overrides))
    data, vae = experiment.data.clips, load_vae(options.vae)
    chosen = choose_clips(data, options.num_clips)
    for size, _, _ in chosen:
        vae.config.latent_shape(size.num_frames, size.height, size.width)
    info = RecordsInfo(
        vae=str(options.vae),
        encoder=encoder_fingerprint(vae),
        channels=vae.config.latent_channels,
        spatial_factor=vae.config.spatial_factor,
        temporal_factor=vae.config.temporal_factor,
        fps=data.fps,
    )
    broken: dict[str, str] = {}
    clips = encode_clips(
        vae,
        chosen,
        batch_size=options.batch_size,
        mesh=MeshOptions().build(),
        broken=broken,
        num_threads=experiment.run.num_threads,
    )
    total = sum(len(indices) for *_, indices in chosen)
    counts: collections.Counter[tuple[int, int, int]] = collections.Counter()

    def counted():
        for clip in tqdm(clips, total=total, unit="clip", dynamic_ncols=True, file=sys.stderr):
            counts[clip.num_frames, clip.height, clip.width] += 1
            yield clip

    written = write_latent_records(options.out, counted(), info)
    for name, reason in broken.items():
        print(f"LEFT OUT  {name}: {reason}")
    for size, count in counts.items():
        print(f"{count} clips of {size[0]} x {size[1]} x {size[2]}")
    print(f"wrote the latents of {written} clips: {options.out}")
    return 0
