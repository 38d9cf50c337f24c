"""Previews during training: reconstructions and samples as grids of video, with their scores."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vidgen.core.typing import Array, Metrics, UInt8, Video
from vidgen.data.video_io import save_video
from vidgen.evals.quality import evaluate_reconstruction
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel import processes
from vidgen.parallel.rules import constrain

__all__ = ["ReconstructionPreview", "SamplePreview", "grid", "reconstruct"]


@jax.jit
def reconstruct(vae: VideoVAE, video: Video) -> Video:
    """Encodes and decodes without sampling; pixels in [-1, 1]. The result is replicated on every device."""
    return constrain(vae.decode(vae.encode(video)), *(None,) * 5)


def grid(videos: UInt8[np.ndarray, "b t h w c"]) -> UInt8[np.ndarray, "t h2 w2 c"]:
    """Clips of equal size as a grid, as square as possible; empty cells are black."""
    count, frames, height, width, channels = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    filled = np.zeros((rows * columns, frames, height, width, channels), np.uint8)
    filled[:count] = videos
    filled = filled.reshape(rows, columns, frames, height, width, channels)
    return filled.transpose(2, 0, 3, 1, 4, 5).reshape(frames, rows * height, columns * width, channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionPreview:
    """Held-out clips (left) and reconstructions (right) as `samples/step_<n>.mp4`; returns PSNR and SSIM."""

    clips: UInt8[np.ndarray, "b t h w 3"]
    every: int
    fps: float
    name: str = "heldout"

    def __call__(
        self, model: VideoVAE, frozen: Mapping[str, Any], *, step: int, workdir: pathlib.Path
    ) -> Metrics:
        reconstructed: list[np.ndarray] = []

        def run(video: Video) -> Array:
            output = reconstruct(model, video)
            rounded = np.clip(np.rint((np.asarray(output) + 1) * 127.5), 0, 255).astype(np.uint8)
            reconstructed.append(rounded)
            return output

        scores = evaluate_reconstruction(run, [self.clips])
        if processes.is_main_process():
            pairs = np.concatenate([self.clips, reconstructed[0]], axis=3)
            save_video(_path(workdir, step), grid(pairs), fps=self.fps)
        return {name: scores[name] for name in ("psnr", "ssim")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplePreview:
    """Samples of fixed prompts and seeds as `samples/step_<n>.mp4`, with the prompts in its metadata.

    Attributes:
      sample: generates a clip for each prompt, from a model and its VAE.
    """

    prompts: tuple[str, ...]
    sample: Callable[[TextToVideo, VideoVAE, Sequence[str]], UInt8[np.ndarray, "b t h w 3"]]
    every: int
    fps: float
    name: str = "samples"

    def __call__(
        self, model: TextToVideo, frozen: Mapping[str, Any], *, step: int, workdir: pathlib.Path
    ) -> Metrics:
        videos = self.sample(model, frozen["vae"], self.prompts)
        if processes.is_main_process():
            metadata = {"prompts": "\n".join(self.prompts), "step": str(step)}
            save_video(_path(workdir, step), grid(videos), fps=self.fps, metadata=metadata)
        return {}


def _path(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "samples" / f"step_{step:07d}.mp4"
