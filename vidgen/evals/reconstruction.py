"""Reconstruction of videos by a VAE, scored as they stream: memory does not grow with duration."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.core import pixels
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, RGBClip, UInt8
from vidgen.data.source import BrokenClip
from vidgen.evals.frechet import Moments, frechet_distance
from vidgen.evals.quality import SMALLEST_FRAME, flicker, psnr, ssim
from vidgen.evals.video_scores import VideoScores
from vidgen.models.i3d import model as i3d_model
from vidgen.models.i3d.model import I3D
from vidgen.models.lpips import model as lpips_model
from vidgen.models.lpips.model import LPIPS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.models.video_vae.streaming import decode_stream, encode_stream, fill_sides

__all__ = ["RFVD", "FeatureNetworks", "VideoScorer", "reconstruct_frames"]

Frame = UInt8[np.ndarray, "h w 3"]
Pairs = Iterator[tuple[RGBClip, RGBClip]]
"""Original and reconstruction of consecutive frames."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureNetworks:
    """Feature networks for scores, each optional: their weights are supplied by the user.

    Attributes:
      lpips: network for LPIPS.
      i3d: network for rFVD, the Frechet video distance of reconstructions.
      clip_frames: frames of a clip for rFVD. Videos are split into clips end to end; a remainder is left out.

    Raises:
      UserError: clips are too short for I3D.
    """

    lpips: LPIPS | None = None
    i3d: I3D | None = None
    clip_frames: int = 16

    def __post_init__(self):
        if self.i3d is not None and self.clip_frames < i3d_model.FEWEST_FRAMES:
            raise UserError(
                f"rFVD of clips of {self.clip_frames} frames: I3D needs at least {i3d_model.FEWEST_FRAMES}"
            )

    @property
    def smallest_side(self) -> int:
        """Smallest side of a video that can be scored, in pixels."""
        return SMALLEST_FRAME if self.lpips is None else lpips_model.SMALLEST_SIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class RFVD:
    """Moments of the features of original and reconstructed clips; None without clips."""

    original: Moments | None = None
    made: Moments | None = None

    def __add__(self, other: "RFVD") -> "RFVD":
        if self.original is None or self.made is None:
            return other
        if other.original is None or other.made is None:
            return self
        return RFVD(original=self.original + other.original, made=self.made + other.made)

    @property
    def num_clips(self) -> int:
        """Number of original clips, equal to that of reconstructed clips."""
        return 0 if self.original is None else self.original.count

    def distance(self) -> float:
        """The Frechet video distance.

        Raises:
          UserError: there are fewer than two clips.
        """
        if self.original is None or self.made is None or self.num_clips < 2:
            raise UserError(f"rFVD needs at least 2 clips; there are {self.num_clips}")
        return frechet_distance(self.original, self.made)


def reconstruct_frames(vae: VideoVAE, frames: Iterable[Frame], *, group: int = 1) -> Pairs:
    """Yields groups of frames with their reconstruction, without sampling, as soon as each is decoded.

    Sides that are not a multiple of the VAE's spatial factor, and an incomplete last group, are padded by
    repetition; outputs are cropped to the input.

    Args:
      vae: the autoencoder.
      frames: frames of one size, any number.
      group: latent frames computed at a time.

    Raises:
      UserError: the VAE's output is not finite.
    """
    originals: collections.deque[np.ndarray] = collections.deque()

    def normalized() -> Iterator[np.ndarray]:
        for frame in frames:
            originals.append(frame)
            padded = fill_sides(frame, vae.config.spatial_factor)
            yield padded[None].astype(np.float32) / 127.5 - 1.0

    for block in decode_stream(vae, encode_stream(vae, normalized(), group=group)):
        if not bool(jnp.isfinite(block).all()):
            raise UserError("the VAE's output has pixels that are not finite: use an earlier checkpoint")
        made = np.asarray(pixels.to_uint8(block))[0, : len(originals)]
        original = np.stack([originals.popleft() for _ in made])
        yield original, made[:, : original.shape[1], : original.shape[2]]


class VideoScorer:
    """Scores of one video and its reconstruction, accumulated piece by piece."""

    def __init__(self, name: str, networks: FeatureNetworks):
        self.rfvd = RFVD()
        self._name, self._networks = name, networks
        self._sums: dict[str, float] = collections.defaultdict(float)
        self._num_frames = 0
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self._clip: list[tuple[np.ndarray, np.ndarray]] = []

    def watch(self, pairs: Pairs) -> Pairs:
        """Yields the pairs unchanged and scores each one.

        Raises:
          BrokenClip: there are no frames, or frames are too small.
        """
        for original, made in pairs:
            if min(original.shape[1:3]) < (least := self._networks.smallest_side):
                size = f"{original.shape[1]} x {original.shape[2]}"
                raise BrokenClip(self._name, f"its frames are {size}, to score them takes {least} x {least}")
            self._add(original, made)
            yield original, made
        if not self._num_frames:
            raise BrokenClip(self._name, "it has no frames")

    def scores(self) -> VideoScores:
        """Scores of the frames so far, at least one."""
        means = {name: self._sums[name] / self._num_frames for name in ("psnr", "ssim")}
        if self._num_frames > 1:
            means["flicker"] = self._sums["flicker"] / (self._num_frames - 1)
        if self._networks.lpips is not None:
            means["lpips"] = self._sums["lpips"] / self._num_frames
        return VideoScores(name=self._name, num_frames=self._num_frames, **means)

    def _add(self, original: RGBClip, made: RGBClip) -> None:
        last = self._last or (original[:0], made[:0])
        self._last = original[-1:], made[-1:]
        changes = flicker(np.concatenate([last[1], made]), np.concatenate([last[0], original]))
        self._sums["psnr"] += float(psnr(made, original).sum())
        self._sums["ssim"] += float(ssim(made, original).sum())
        self._sums["flicker"] += float(changes.sum())
        if self._networks.lpips is not None:
            # One frame at a time: LPIPS features take many times the memory of a frame.
            for a, b in zip(made, original, strict=True):
                self._sums["lpips"] += float(_lpips(self._networks.lpips, a, b))
        self._num_frames += len(original)
        if self._networks.i3d is not None:
            self._add_to_clip(self._networks.i3d, original, made)

    def _add_to_clip(self, i3d: I3D, original: RGBClip, made: RGBClip) -> None:
        length = self._networks.clip_frames
        self._clip.extend(zip(original, made, strict=True))
        while len(self._clip) >= length:
            clip, self._clip = self._clip[:length], self._clip[length:]
            features = (Moments.of(_features(i3d, np.stack(side))) for side in zip(*clip, strict=True))
            self.rfvd += RFVD(original=next(features), made=next(features))


@jax.jit
def _lpips(lpips: LPIPS, a: UInt8[Array, "h w 3"], b: UInt8[Array, "h w 3"]) -> Float[Array, ""]:
    x, y = (pixels.to_float(frame[None, None]) for frame in (a, b))
    return lpips(x, y)[0, 0]


def _features(i3d: I3D, clip: RGBClip) -> Float[np.ndarray, "1 400"]:
    # Resized in a separate jit, so that I3D compiles once, not once per video size.
    return np.asarray(_jit_i3d(i3d, _jit_resize(clip[None])))


_jit_i3d = jax.jit(lambda i3d, video: i3d(video))


@jax.jit
def _jit_resize(clip: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t 224 224 3"]:
    return i3d_model.resize(pixels.to_float(clip))
