"""Clips decoded per second and core: vidgen's reader (PyAV), opencv and imageio-ffmpeg on the same files.

  python benchmarks/data_throughput.py [FOLDER] [--num-frames 17 --fps 8 --height 64 --width 64] [--rounds 5]

Each reader returns the same clips: seek, take the nearest frames at `fps`, resize, crop, RGB. The readers
take turns within each round. A reader's figure is the median over rounds of clips per second of CPU time,
child processes included, which makes it a figure per core and independent of other load. Decoders run with
one thread. Needs the `bench` extra. The last line is one JSON object.
"""

import argparse
import json
import logging
import os
import pathlib
import resource
import statistics
import tempfile
from collections.abc import Callable

os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "threads;1")  # opencv reads it when it is imported

import cv2
import imageio_ffmpeg
import numpy as np

from vidgen.data.folder import FolderData, UsedFile
from vidgen.data.geometry import Crop
from vidgen.data.video_io import read_clip, save_video

Reader = Callable[[UsedFile, float, FolderData], np.ndarray]


def read_with_pyav(file: UsedFile, start: float, data: FolderData) -> np.ndarray:
    """Reads a clip with vidgen's reader, which training uses."""
    return read_clip(
        file.path, start=start, num_frames=data.num_frames, fps=data.fps, height=data.height, width=data.width
    )


def read_with_opencv(file: UsedFile, start: float, data: FolderData) -> np.ndarray:
    """Seeks by frame number, skips frames with `grab`, and converts only the frames of the clip."""
    capture = cv2.VideoCapture(str(file.path), cv2.CAP_FFMPEG)
    crop = _crop(file, data)
    times = start + np.arange(data.num_frames) / data.fps
    wanted = np.ceil(times * file.info.fps - 0.5 - 1e-6).astype(int)
    if file.info.num_frames:
        wanted = np.minimum(wanted, file.info.num_frames - 1)
    at = int(wanted[0])
    if at:
        capture.set(cv2.CAP_PROP_POS_FRAMES, at)
    frames: list[np.ndarray] = []
    for index in wanted:
        while at <= index:
            capture.grab()
            at += 1
        _, picture = capture.retrieve()
        picture = cv2.resize(picture, crop.resized[::-1], interpolation=cv2.INTER_AREA)
        frames.append(crop.apply(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)))
    capture.release()
    return np.stack(frames)


def read_with_imageio_ffmpeg(file: UsedFile, start: float, data: FolderData) -> np.ndarray:
    """Runs one ffmpeg process per clip, which resamples, resizes and crops."""
    crop = _crop(file, data)
    height, width = crop.resized
    filters = (
        # Nearest frame: shift half a frame earlier, then take the last frame at or before each time.
        f"setpts=PTS-{0.5 / file.info.fps:.6f}/TB,fps={data.fps}:start_time=0:round=up,"
        f"scale={width}:{height}:flags=bicubic,crop={data.width}:{data.height}:{crop.left}:{crop.top}"
    )
    frames = imageio_ffmpeg.read_frames(
        str(file.path),
        input_params=["-threads", "1", "-ss", f"{start:.6f}"],
        output_params=["-threads", "1", "-vf", filters, "-frames:v", str(data.num_frames)],
    )
    next(frames)  # Metadata of the file.
    clip = [np.frombuffer(frame, np.uint8).reshape(data.height, data.width, 3) for frame in frames]
    return np.stack(clip)


def measure(data: FolderData, rounds: int) -> dict[str, object]:
    """Reads every clip of the folder with every reader, `rounds` times; returns the figures for JSON."""
    clips = [(file, start) for file in data.scan().used for start in file.starts]
    if not clips:
        raise ValueError(
            f"{data.path}: no clip of {data.num_frames} frames at {data.fps:g} fps fits in its files"
        )
    readers: dict[str, Reader] = {
        "pyav": read_with_pyav,
        "opencv": read_with_opencv,
        "imageio_ffmpeg": read_with_imageio_ffmpeg,
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    difference = dict.fromkeys(readers, 0.0)
    cv2.setNumThreads(1)
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # It warns about every resized file.
    for index in range(rounds + 1):
        for name, reader in readers.items():
            before = _processor_seconds()
            videos = [reader(file, start, data) for file, start in clips]
            rate = len(clips) / (_processor_seconds() - before)
            if index == 0:  # Untimed round: warms caches and compares the readers.
                reference = videos if name == "pyav" else reference
                pairs = zip(videos, reference, strict=True)
                difference[name] = statistics.mean(
                    float(np.abs(a[: len(b)].astype(int) - b[: len(a)]).mean()) for a, b in pairs
                )
            else:
                rates[name].append(rate)
                print(f"round {index}: {name} {rate:.1f} clips/s/core", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "clips_per_second_per_core": {name: round(value, 2) for name, value in medians.items()},
        "pyav_over_opencv": round(medians["pyav"] / medians["opencv"], 3),
        "pyav_over_imageio_ffmpeg": round(medians["pyav"] / medians["imageio_ffmpeg"], 3),
        "mean_difference_from_pyav": {name: round(value, 2) for name, value in difference.items()},
        "clips": len(clips),
        "rounds": rounds,
        "clip": [data.num_frames, data.height, data.width],
        "fps": data.fps,
    }


def make_files(folder: pathlib.Path) -> None:
    """Writes three videos of four seconds at 25 fps: moving colour waves with some noise."""
    rng = np.random.default_rng(0)
    for height, width in ((144, 256), (360, 640), (720, 1280)):
        y, x = np.mgrid[:height, :width] / height
        frames = []
        for index in range(100):
            waves = [np.sin(9 * x + 5 * y + index / 7 + shift) for shift in (0, 2, 4)]
            grain = rng.normal(0, 4, (height, width, 1))
            frames.append(np.clip(127 + 90 * np.stack(waves, -1) + grain, 0, 255).astype(np.uint8))
        save_video(folder / f"{width}x{height}.mp4", np.stack(frames), fps=25, crf=23)


def _crop(file: UsedFile, data: FolderData) -> Crop:
    shown = (file.info.height, file.info.width)
    return Crop.covering(shown, (data.height, data.width), pixel_aspect=file.info.pixel_aspect)


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Prints a line per reader and round, and the medians as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder of videos; default: synthetic ones")
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if options.folder is None:
            make_files(pathlib.Path(made))
        data = FolderData(
            path=options.folder or made,
            num_frames=options.num_frames,
            fps=options.fps,
            height=options.height,
            width=options.width,
        )
        print(json.dumps(measure(data, options.rounds)))


if __name__ == "__main__":
    main()
