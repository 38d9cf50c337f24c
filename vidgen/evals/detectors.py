"""Detection of the objects and the background of a sprite-world clip, from pixels alone."""

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
"""Shorter side in pixels to which larger frames are approximately downscaled, by averaging."""
FRAMES_FOR_SHAPE = 3
MOSTLY = 0.6
"""Share of an object's area that suffices to locate it."""
SAME_FIT = 0.94
"""Share of the median fit above which an object that touches another counts as in front of it, or barely
covered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectReading:
    """One detected object.

    Attributes:
        presence: share of the frames in which the object was detected.
    """

    colour: str
    shape: Shape
    size: Size
    motion: Motion
    presence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection:
    """Objects and background of one clip. In clips of one frame, every motion is `still`."""

    objects: tuple[ObjectReading, ...]
    background: BackgroundReading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Track:
    """One object in the frames where it was detected.

    Attributes:
        frames: indices of these frames.
        alpha: coverage in [0, 1].
        centre: centroid (y, x) in pixels.
        whole: whether the object is neither cut by the frame's edge nor next to another object.
    """

    frames: np.ndarray
    alpha: Float[np.ndarray, "t h w"]
    centre: Float[np.ndarray, "t 2"]
    whole: np.ndarray


def detect(video: RGBClip) -> Detection:
    """Detects the objects, with colour, shape, size and motion, and the background.

    Most reliable for proportions of the sprite world and sides of 64 pixels or more.
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
    """Tracks of the objects of one colour; their number is the median number of pieces per frame."""
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
    """Connected pieces of one frame's mask, largest first, without those too small for an object.

    Pieces that touch objects of other colours count as one piece: most are parts of one covered object.
    """
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3), bool), output=labels)
    sizes = np.bincount(labels.ravel())[1:]
    order = [k for k in np.argsort(-sizes) if sizes[k] >= max(area / 2, 0.2 * sizes.max())]
    pieces = [labels == k + 1 for k in order]
    touching = [piece for piece in pieces if (piece & crowded).any()]
    if len(touching) < 2:
        return pieces
    isolated = [piece for piece in pieces if not (piece & crowded).any()]
    return [np.any(touching, axis=0), *isolated]


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
    if not len(whole):  # never unobstructed: use the frames that show most of it
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
    """Radius at half time, and ratio of last to first radius, from a line fit to the logarithm."""
    if len(frames) < 2 or (frames[-1] - frames[0]) * 8 < num_frames - 1:  # too short to extrapolate from
        return float(np.median(radius)), 1.0
    slope, level = np.polyfit(frames - (num_frames - 1) / 2, np.log(radius), 1)
    return float(np.exp(level)), float(np.exp(slope * (num_frames - 1)))
