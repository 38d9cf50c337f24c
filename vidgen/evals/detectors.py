"""Read from pixels alone what is in a clip of the sprite world."""

import dataclasses

import numpy as np
from scipy import ndimage, optimize

from vidgen.core.typing import Float, RGBClip
from vidgen.data.sprites.attributes import DIAMETERS, Backdrop, Motion, Shape, Size
from vidgen.evals.camera_reading import camera_offsets
from vidgen.evals.motion_reading import read_motion
from vidgen.evals.segmentation import BackgroundReading, Layer, estimate_background, segment, smallest_area
from vidgen.evals.shape_matching import match_quality, match_shape, unit_area

__all__ = ["Detection", "ObjectReading", "detect"]

WORKING_SIZE = 96
"""Larger frames are averaged down to about this."""
FRAMES_FOR_SHAPE = 3
MOSTLY = 0.6
"""Share of an object's area that is enough to say where it is."""
SAME_FIT = 0.94
"""An object that touches another is in front of it, or barely covered, if its shape fits this well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectReading:
    """One object found.

    Attributes:
        presence: share of the frames in which it was seen.
    """

    colour: str
    shape: Shape
    size: Size
    motion: Motion
    presence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection:
    """Everything read from one clip. Motions of one-frame clips read as still."""

    objects: tuple[ObjectReading, ...]
    background: BackgroundReading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Track:
    """One object over the frames in which it was seen; `whole` where nothing covers or cuts it."""

    frames: np.ndarray
    alpha: Float[np.ndarray, "t h w"]
    centre: Float[np.ndarray, "t 2"]
    whole: np.ndarray


def detect(video: RGBClip) -> Detection:
    """Read the objects, with colour, shape, size and motion, and the background.

    Works best for the sprite world's own proportions, from 64 pixels upwards.
    """
    factor = max(1, min(video.shape[1:3]) // WORKING_SIZE)
    pixels = _shrink(video.astype(np.float32), factor)
    background = estimate_background(pixels)
    textured = background.kind is Backdrop.TEXTURED
    offsets = camera_offsets(background.residual) if textured else np.zeros(len(video))
    objects = [
        _read(layer.colour, track, offsets, len(video))
        for layer in segment(pixels, background)
        for track in _tracks(layer)
    ]
    return Detection(objects=tuple(objects), background=background)


def _shrink(video: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return video
    t, h, w = video.shape[0], video.shape[1] // factor, video.shape[2] // factor
    blocks = video[:, : h * factor, : w * factor].reshape(t, h, factor, w, factor, 3)
    return blocks.mean(axis=(2, 4))


def _tracks(layer: Layer) -> list[Track]:
    """Objects of one colour. Two pieces are two objects if the colour is in two pieces in most frames."""
    area = smallest_area(*layer.mask.shape[1:])
    pieces = [_pieces(mask, crowded, area) for mask, crowded in zip(layer.mask, layer.crowded, strict=True)]
    frames = [k for k, found in enumerate(pieces) if found]
    if not frames:
        return []
    count = int(np.median([len(pieces[k]) for k in frames]))
    if count == 1:
        return [_track(layer, frames, [np.any(pieces[k], axis=0) for k in frames])]
    frames = [k for k in frames if len(pieces[k]) >= count]
    chains = [[piece] for piece in pieces[frames[0]][:count]]
    for k in frames[1:]:
        cost = [[np.linalg.norm(_centre(c[-1]) - _centre(p)) for p in pieces[k]] for c in chains]
        for i, j in zip(*optimize.linear_sum_assignment(np.array(cost)), strict=True):
            chains[i].append(pieces[k][j])
    return [_track(layer, frames, chain) for chain in chains]


def _pieces(mask: np.ndarray, crowded: np.ndarray, area: float) -> list[np.ndarray]:
    """Connected pieces of a frame's mask, the largest first, without what is small for an object.

    Pieces that touch objects of other colours count as one: most are the rest of one object behind.
    """
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3), bool), output=labels)
    sizes = np.bincount(labels.ravel())[1:]
    order = [k for k in np.argsort(-sizes) if sizes[k] >= max(area / 2, 0.2 * sizes.max())]
    pieces = [labels == k + 1 for k in order]
    touching = [piece for piece in pieces if (piece & crowded).any()]
    if len(touching) < 2:
        return pieces
    alone = [piece for piece in pieces if not (piece & crowded).any()]
    return [np.any(touching, axis=0), *alone]


def _centre(weight: np.ndarray) -> np.ndarray:
    rows, columns = weight.sum(axis=1), weight.sum(axis=0)
    total = rows.sum()
    return np.array([rows @ np.arange(len(rows)), columns @ np.arange(len(columns))]) / total


def _track(layer: Layer, frames: list[int], masks: list[np.ndarray]) -> Track:
    near = ndimage.maximum_filter(np.stack(masks).astype(np.uint8), (1, 3, 3)).astype(bool)
    alpha = layer.alpha[frames] * near
    edge = np.ones(layer.mask.shape[1:], bool)
    edge[1:-1, 1:-1] = False
    cut = (np.stack(masks) & edge[None]).sum(axis=(1, 2)) > 1
    crowded = (layer.crowded[frames] & near).sum(axis=(1, 2)) > 1
    centre = np.stack([_centre(a) for a in alpha])
    return Track(frames=np.asarray(frames), alpha=alpha, centre=centre, whole=~cut & ~crowded)


def _read(colour: str, track: Track, offsets: np.ndarray, num_frames: int) -> ObjectReading:
    area = track.alpha.sum(axis=(1, 2))
    whole = np.flatnonzero(track.whole)
    if not len(whole):  # nowhere alone: where most of it is seen
        whole = np.flatnonzero(area >= 0.8 * area.max())
    best = whole[np.argsort(-area[whole], kind="stable")][: 2 * FRAMES_FOR_SHAPE : 2]
    shape = match_shape(track.alpha[best], track.centre[best]).shape
    fit = match_quality(shape, track.alpha, track.centre)
    good = np.flatnonzero(track.whole | (fit > SAME_FIT * np.median(fit[best])))
    radius = np.sqrt(area[good] / unit_area(shape)) / min(track.alpha.shape[1:])
    middle, growth = _growth(track.frames[good], radius, num_frames)
    size = min(DIAMETERS, key=lambda s: abs(np.log(2 * middle / DIAMETERS[s])))
    seen = np.union1d(good, np.flatnonzero(area > MOSTLY * np.median(area[good])))
    position = track.centre + np.stack([np.zeros(len(area)), offsets[track.frames]], axis=-1)
    motion = read_motion(
        shape=shape,
        position=position[seen] / min(track.alpha.shape[1:]),
        growth=growth,
        alpha=track.alpha[good],
        centre=track.centre[good],
    )
    return ObjectReading(
        colour=colour, shape=shape, size=size, motion=motion, presence=len(track.frames) / num_frames
    )


def _growth(frames: np.ndarray, radius: np.ndarray, num_frames: int) -> tuple[float, float]:
    """Radius at half time and its ratio from the first frame to the last, by a line through its logarithm."""
    if (
        len(frames) < 2 or (frames[-1] - frames[0]) * 8 < num_frames - 1
    ):  # too short a time to extrapolate from
        return float(np.median(radius)), 1.0
    slope, level = np.polyfit(frames - (num_frames - 1) / 2, np.log(radius), 1)
    return float(np.exp(level)), float(np.exp(slope * (num_frames - 1)))
