"""`vidgen data`: checks a folder of videos, or writes clips or their latents as ArrayRecord files.

Examples:
  vidgen data check clips --num-frames 17 --fps 8
  vidgen data check clips --bucket 1x256x256 --bucket 17x256x448 --bucket 17x448x256
  vidgen data build folder clips --out records --height 128 --width 128 --heldout-every 20
  vidgen data build sprites --out records --num-clips 1000 --num-heldout 100
  vidgen data latents --config experiments/dit/sprites.py:packed --vae runs/vae --out runs/sprites_latents
"""

import argparse
import concurrent.futures
import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from vidgen.cli.data_latents import add_latents_options, write_latents
from vidgen.core import limits
from vidgen.core.paths import path_option
from vidgen.data.buckets import Bucket
from vidgen.data.check import find_damage
from vidgen.data.folder import FolderData, FolderReport, UsedFile
from vidgen.data.source import ClipSource

__all__ = ["main"]

_CHECK_THREADS = 4


def main(argv: Sequence[str]) -> int:
    """Runs `vidgen data`.

    Args:
      argv: arguments after `data`.

    Returns:
      0; 1 if no clip can be used; 2 if the arguments are wrong or the folder is missing.
    """
    parser = _parser()
    try:
        options, overrides = parser.parse_known_args(argv)
        if overrides and options.run is not write_latents:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if options.run is write_latents:
            return write_latents(options, overrides)
        return options.run(options)
    except (OSError, ValueError) as error:
        print(f"vidgen data: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    check = commands.add_parser(
        "check", help="list every file that is used, and the reason for each that is not"
    )
    _add_folder_options(check)
    check.add_argument(
        "--bucket",
        action="append",
        default=[],
        type=_bucket,
        metavar="FRAMESxHEIGHTxWIDTH",
        help="a clip size, for the files that suit it; repeat for several sizes; replaces --num-frames, "
        "--height and --width",
    )
    check.add_argument(
        "--decode", action="store_true", help="decode every file to its end, to find damage anywhere in it"
    )
    check.add_argument(
        "--max-bytes",
        type=limits.TOKENS,
        metavar="N",
        help="list the captions that training would truncate with task.text.max_bytes=N",
    )
    check.set_defaults(run=_check)
    build = commands.add_parser(
        "build", help="write clips as records, for training from local or cloud storage"
    )
    kinds = build.add_subparsers(required=True, metavar="kind")
    folder = kinds.add_parser("folder", help="the clips of a folder of videos")
    _add_folder_options(folder)
    folder.add_argument(
        "--heldout-every",
        type=limits.HELDOUT_EVERY,
        metavar="SECONDS",
        help="also write a split `heldout`: the clips that overlap the last second of every SECONDS seconds",
    )
    _add_build_options(folder, encoding="h264")
    folder.set_defaults(run=_build_folder)
    sprites = kinds.add_parser(
        "sprites", help="clips of the procedural world, with captions and ground truth"
    )
    _add_clip_options(sprites)
    sprites.add_argument(
        "--num-clips", type=limits.COUNT, default=1000, help="clips for training (default 1000)"
    )
    sprites.add_argument(
        "--num-heldout", type=limits.NUM_CLIPS, default=0, help="clips in a split `heldout` (default none)"
    )
    sprites.add_argument("--seed", type=limits.SEED, default=0, help="random seed of the clips (default 0)")
    _add_build_options(sprites, encoding="lossless")
    sprites.set_defaults(run=_build_sprites)
    latents = commands.add_parser(
        "latents",
        help="encode the clips of an experiment as latents, for training on packed clips of any size",
    )
    add_latents_options(latents)
    latents.set_defaults(run=write_latents)
    return parser


def _add_clip_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-frames", type=limits.NUM_FRAMES, default=17, help="frames per clip (default 17)"
    )
    parser.add_argument(
        "--fps", type=limits.FPS, default=8.0, help="frames per second of the clips (default 8)"
    )
    parser.add_argument("--height", type=limits.SIDE, default=64, help="pixels (default 64)")
    parser.add_argument("--width", type=limits.SIDE, default=64, help="pixels (default 64)")


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=path_option, metavar="DIR", help="the folder; it is searched recursively")
    _add_clip_options(parser)
    parser.add_argument("--stride", type=limits.SECONDS, help="seconds between clips (default: end to end)")
    parser.add_argument(
        "--captions",
        type=path_option,
        metavar="FILE",
        help="a .jsonl or .csv file with the captions of all files",
    )
    parser.add_argument("--require-captions", action="store_true", help="skip files without a caption")


def _add_build_options(parser: argparse.ArgumentParser, *, encoding: str) -> None:
    parser.add_argument("--out", type=path_option, required=True, metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--encoding",
        choices=("lossless", "h264"),
        default=encoding,
        help=f"how frames are stored: exactly, or compressed as H.264 (default {encoding})",
    )


def _bucket(text: str) -> Bucket:
    sides = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of clips; give it as 17x256x448")
    num_frames, height, width = map(int, sides.groups())
    try:
        return Bucket(num_frames=num_frames, height=height, width=width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _folder_data(options: argparse.Namespace, **more: object) -> FolderData:
    return FolderData(
        path=str(options.dir),
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        stride=options.stride,
        captions=None if options.captions is None else str(options.captions),
        require_captions=options.require_captions,
        **more,  # pyright: ignore[reportArgumentType]
    )


def _check(options: argparse.Namespace) -> int:
    data = _folder_data(options, buckets=tuple(options.bucket))
    sizes = data.buckets or (Bucket(num_frames=data.num_frames, height=data.height, width=data.width),)
    reports = data.scan_buckets() if data.buckets else (data.scan(),)
    reports = _without_damage(reports, full=options.decode)
    used = {file.name: file for report in reports for file in report.used}
    rejected = {name: why for report in reports for name, why in report.rejected if name not in used}
    for name in sorted(used):
        counts = [
            f"{len(file.starts)} clips" + (f" of {size}" if data.buckets else "")
            for size, report in zip(sizes, reports, strict=True)
            for file in report.used
            if file.name == name
        ]
        print(f"used      {name}: {', '.join(counts)}; {_describe(used[name])}")
    for name in sorted(rejected):
        print(f"NOT USED  {name}: {rejected[name]}")
    for size, report in zip(sizes, reports, strict=True):
        clips = f"{report.num_clips} clips of {size if data.buckets else f'{size.num_frames} frames'}"
        left = f"; {len(rejected)} files not used" if size is sizes[-1] else ""
        print(f"{clips} at {data.fps:g} fps, from {len(report.used)} files{left}")
    if without := [name for name, file in used.items() if not file.caption]:
        print(f"{len(without)} of the files used have no caption")
    if options.max_bytes is not None:
        sizes_of = {name: len(file.caption.encode()) for name, file in sorted(used.items())}
        long = [f"{name} ({size} bytes)" for name, size in sizes_of.items() if size > options.max_bytes]
        print(f"{len(long)} captions are truncated to {options.max_bytes} bytes", *long, sep="\n  ")
    empty = [size for size, report in zip(sizes, reports, strict=True) if not report.used]
    for size in empty:
        where = f" for the bucket {size}" if data.buckets else ""
        print(f"vidgen data: nothing in {options.dir} can be used{where}", file=sys.stderr)
    return 1 if empty else 0


def _without_damage(reports: Sequence[FolderReport], *, full: bool) -> list[FolderReport]:
    """The reports with damaged files moved to `rejected`; decodes each file once."""
    files = list({file.name: file for report in reports for file in report.used}.values())
    with concurrent.futures.ThreadPoolExecutor(_CHECK_THREADS) as pool:
        found = pool.map(lambda file: find_damage(file.path, file.info, full=full), files)
        damage = {file.name: why for file, why in zip(files, found, strict=True) if why}
    return [
        FolderReport(
            used=tuple(file for file in report.used if file.name not in damage),
            rejected=tuple(sorted({**dict(report.rejected), **damage}.items())),
        )
        for report in reports
    ]


def _describe(file: UsedFile) -> str:
    info = file.info
    if info.is_image:
        shape = f"{info.width}x{info.height} image ({info.codec})"
    else:
        count = f"{info.num_frames} frames" if info.num_frames else "frames not counted"
        shape = (
            f"{info.width}x{info.height}, {info.fps:.5g} fps, {count}, {info.duration:.2f} s ({info.codec})"
        )
    turned = f", shown turned by {info.rotation} degrees" if info.rotation else ""
    caption = f'"{file.caption}"' if file.caption else "no caption"
    return f"{shape}{turned}; {caption}"


def _build_folder(options: argparse.Namespace) -> int:
    if options.heldout_every is None:
        splits = {"train": _folder_data(options)}
    else:
        splits = {
            split: _folder_data(options, split=split, heldout_every=options.heldout_every)
            for split in ("train", "heldout")
        }
    return _build({split: data.source() for split, data in splits.items()}, options)


def _build_sprites(options: argparse.Namespace) -> int:
    from vidgen.data.sprites.source import SpritesData

    counts: dict[Literal["train", "heldout"], int] = {
        "train": options.num_clips,
        "heldout": options.num_heldout,
    }
    sources = {
        split: SpritesData(
            num_clips=count,
            seed=options.seed,
            num_frames=options.num_frames,
            height=options.height,
            width=options.width,
            fps=options.fps,
            split=split,
        ).source()
        for split, count in counts.items()
        if count
    }
    return _build(sources, options)


def _build(sources: Mapping[str, ClipSource], options: argparse.Namespace) -> int:
    from vidgen.data.tfds_builder import build_records  # imports take a second, and `check` needs none

    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress to stdout
        report = build_records(sources, options.out, fps=options.fps, encoding=options.encoding)
    for name, reason in report.broken.items():
        print(f"LEFT OUT  {name}: {reason}")
    counts = ", ".join(f"{count} clips in {split}" for split, count in report.num_clips.items())
    print(f"wrote {counts}: {report.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
