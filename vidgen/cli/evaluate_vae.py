"""The part of `vidgen evaluate` that scores a VAE's reconstructions of videos."""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.data.folder_files import clip_files
from vidgen.data.source import BrokenClip, ClipSource
from vidgen.data.video_io import probe, read_frames, save_frames
from vidgen.evals.reconstruction import RFVD, FeatureNetworks, VideoScorer, reconstruct_frames
from vidgen.evals.video_scores import VideoScores, format_scores, overall
from vidgen.models.i3d.params import load_i3d
from vidgen.models.lpips.params import load_lpips
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train.experiment import Experiment

__all__ = ["evaluate_vae", "video_files"]

_log = get_logger(__name__)

_HELD_OUT = 200
"""Default number of clips from a run's data."""

_LISTED = 5
"""Most videos that the error for unreadable videos lists."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """An open video: name, frames per second, and an iterable of frames, uint8 [h w 3]."""

    name: str
    fps: float
    frames: Iterable[np.ndarray]


Open = tuple[str, Callable[[], Opened]]
"""Name of a video, and a function that opens it or raises BrokenClip."""


def evaluate_vae(
    vae: VideoVAE, experiment: Experiment | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Scores the videos of a folder, or the run's held-out clips, and prints a table.

    Args:
      experiment: the run's experiment; None for a VAE without one.
      arguments: the parsed arguments of `vidgen evaluate`.

    Returns:
      The scores that `overall` computes from all videos; with an I3D `rfvd` (None for fewer than two clips)
      and `rfvd_clips`; `skipped`, the reason for each video that cannot be read; `videos`, scores per video.

    Raises:
      UserError: there are no videos, none could be scored, or clips are too short for rFVD.
    """
    length = experiment.data.num_frames if experiment and not arguments.videos else arguments.clip_frames
    if arguments.i3d and length < arguments.clip_frames:
        raise UserError(
            f"held-out clips have {length} frames: for rFVD set --clip-frames from 9 to that number, "
            "or give longer --videos"
        )
    networks = FeatureNetworks(
        lpips=arguments.lpips and load_lpips(arguments.lpips),
        i3d=arguments.i3d and load_i3d(arguments.i3d),
        clip_frames=arguments.clip_frames,
    )
    videos = list(_from_folder(arguments) if arguments.videos else _held_out(experiment, arguments))
    scores: list[VideoScores] = []
    skipped: dict[str, str] = {}
    rfvd = RFVD()
    with tqdm(unit="frame", dynamic_ncols=True, file=sys.stderr) as bar:
        for number, (name, open_video) in enumerate(videos, 1):
            bar.set_description(f"video {number} of {len(videos)}")
            try:
                scorer = _score(vae, open_video(), networks, arguments, bar)
            except BrokenClip as error:
                skipped[name] = error.reason
                continue
            except (UserError, OSError) as error:
                skipped[name] = str(error)
                continue
            except Exception as error:  # A defect must not lose the scores of the other videos.
                _log.exception("%s", name)
                skipped[name] = f"{type(error).__name__}: {error}"
                continue
            scores.append(scorer.scores())
            rfvd += scorer.rfvd
    if not scores:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:_LISTED])
        raise UserError(f"none of {len(videos)} videos could be scored: {reasons}")
    total = overall(scores)
    print(format_scores(scores, total))
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    result: dict[str, Any] = dict(total)
    if networks.i3d is not None:
        result |= {"rfvd": rfvd.distance() if rfvd.num_clips > 1 else None, "rfvd_clips": rfvd.num_clips}
        distance = "-" if result["rfvd"] is None else f"{result['rfvd']:.2f}"
        print(f"rFVD {distance} of {rfvd.num_clips} clips of {networks.clip_frames} frames")
    return result | {"skipped": skipped, "videos": [dataclasses.asdict(score) for score in scores]}


def video_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file `path`, or the files in the folder `path`.

    Raises:
      FileNotFoundError: there is no such file or folder.
      UserError: the folder is empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"--videos {path}: no such file or folder")
    files = clip_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--videos {path}: the folder holds no videos")
    return files


def _score(
    vae: VideoVAE, video: Opened, networks: FeatureNetworks, arguments: argparse.Namespace, bar: tqdm
) -> VideoScorer:
    scorer = VideoScorer(video.name, networks)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for original, made in scorer.watch(reconstruct_frames(vae, video.frames, group=arguments.group)):
            bar.update(len(original))
            yield from zip(original, made, strict=True)

    if arguments.side_by_side is None:
        for _ in pairs():
            pass
        return scorer
    name = video.name if video.name.endswith(".mp4") else f"{video.name}.mp4"
    beside = (np.concatenate(pair, axis=1) for pair in pairs())
    metadata = {"vidgen": f"{video.name} (left) and its reconstruction by {arguments.checkpoint}"}
    save_frames(arguments.side_by_side / name, beside, fps=video.fps, metadata=metadata)
    return scorer


def _from_folder(arguments: argparse.Namespace) -> Iterator[Open]:
    root = arguments.videos if arguments.videos.is_dir() else arguments.videos.parent
    for path in video_files(arguments.videos)[: arguments.num_clips]:
        name = path.relative_to(root).as_posix()
        yield name, functools.partial(_open_file, path, name, arguments)


def _open_file(path: pathlib.Path, name: str, arguments: argparse.Namespace) -> Opened:
    fps = arguments.fps or probe(path).fps or 1.0
    frames = read_frames(path, fps=arguments.fps, height=arguments.height, width=arguments.width)
    return Opened(name, fps, _require_one_size(path, frames))


def _require_one_size(path: pathlib.Path, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    shape = None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise BrokenClip(str(path), "its frames change their size: give --height and --width")
        yield frame


def _held_out(experiment: Experiment | None, arguments: argparse.Namespace) -> Iterator[Open]:
    if experiment is None:
        raise UserError(f"{arguments.checkpoint} is a VAE without data of its own: give some with --videos")
    source = experiment.data.clips.heldout().source()
    for index in range(min(arguments.num_clips or _HELD_OUT, len(source))):
        yield f"clip {index}", functools.partial(_open_clip, source, index, experiment.data.fps)


def _open_clip(source: ClipSource, index: int, fps: float) -> Opened:
    clip = source[index]
    return Opened(clip["name"], fps, clip["video"])
