"""Segmentation of sprite-world objects: the colours present, and the pixels of each.

The background is desaturated and varies at most from top to bottom, plus a faint texture; objects are
saturated. No other assumption is made, so that blurry and noisy generated videos can be read too.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from vidgen.core.typing import Bool, Float
from vidgen.data.sprites.attributes import BACKGROUND_COLOURS, COLOURS, Backdrop

__all__ = ["BackgroundReading", "Layer", "estimate_background", "segment", "smallest_area"]

SATURATED = 105.0
"""Difference of largest and smallest channel that no background reaches and all objects exceed."""
COLOUR_RADIUS = 75.0
"""Largest distance, in 8-bit RGB, of the inside of an object from its named colour."""
GRADIENT_SPAN = 30.0
MEDIAN_FRAMES = 4
TEXTURE_CONTRAST = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundReading:
    """Measured background.

    Attributes:
        rows: colour per image row, 8-bit scale.
        residual: luminance relative to `rows`, zero on objects.
    """

    kind: Backdrop
    colour: str
    colour_below: str | None
    rows: Float[np.ndarray, "h 3"]
    residual: Float[np.ndarray, "t h w"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """All pixels of one colour.

    Attributes:
        mask: pixels closer to this colour than to the background or any other colour.
        alpha: coverage in [0, 1], fractional at edges towards the background.
        crowded: pixels of the mask next to another object.
    """

    colour: str
    mask: Bool[np.ndarray, "t h w"]
    alpha: Float[np.ndarray, "t h w"]
    crowded: Bool[np.ndarray, "t h w"]


def smallest_area(height: int, width: int) -> float:
    """Smallest area of an object, in pixels: about a third of the smallest shape."""
    return 0.004 * min(height, width) ** 2


def estimate_background(video: Float[np.ndarray, "t h w 3"]) -> BackgroundReading:
    """Fits the background: a line per channel through the image rows' medians of desaturated pixels."""
    height = video.shape[1]
    empty = _saturation(video) < SATURATED
    sampled = slice(None, None, max(1, len(video) // MEDIAN_FRAMES))
    desaturated = (
        np.where(empty[sampled, ..., None], video[sampled], np.nan)
        .transpose(1, 0, 2, 3)
        .reshape(height, -1, 3)
    )
    usable = empty[sampled].mean(axis=(0, 2)) > 0.05
    centres = (np.arange(height) + 0.5) / height
    if usable.sum() < 2:  # the whole frame is saturated: use its mean
        line = np.stack([video.mean(axis=(0, 1, 2)), np.zeros(3)])
    else:
        medians = np.nanmedian(desaturated[usable], axis=1)
        design = np.stack([np.ones(usable.sum()), centres[usable]], axis=1)
        line = np.linalg.lstsq(design, medians, rcond=None)[0]
    rows = line[:1] + centres[:, None] * line[1:]
    # Blurred edges of objects are not saturated: exclude a margin around objects.
    clear = empty & ~_grow(~empty, 2)
    residual = np.where(clear, (video - rows[None, :, None]).mean(axis=-1), 0).astype(np.float32)
    smooth = ndimage.uniform_filter1d(ndimage.uniform_filter1d(residual, 3, axis=1), 3, axis=2)
    contrast = np.sqrt(np.square(smooth[clear]).mean()) if clear.any() else 0.0
    top, bottom = (_nearest(line[0] + at * line[1], BACKGROUND_COLOURS) for at in (0.0, 1.0))
    kind, below = Backdrop.PLAIN, None
    if contrast > TEXTURE_CONTRAST:
        kind = Backdrop.TEXTURED
    elif top != bottom and np.linalg.norm(line[1]) > GRADIENT_SPAN:
        kind, below = Backdrop.GRADIENT, bottom
    colour = top if below else _nearest(line[0] + 0.5 * line[1], BACKGROUND_COLOURS)
    return BackgroundReading(kind=kind, colour=colour, colour_below=below, rows=rows, residual=residual)


def segment(video: Float[np.ndarray, "t h w 3"], background: BackgroundReading) -> list[Layer]:
    """Layers of the colours present, the largest first."""
    backdrop = np.broadcast_to(background.rows[None, :, None].astype(np.float32), video.shape)
    present = _present_colours(video, backdrop)
    if not present:
        return []
    palette = np.stack([_typical(video, core, COLOURS[name]) for name, core in present.items()])
    labels = _distances(video, backdrop, palette).argmin(axis=0)
    area = smallest_area(*video.shape[1:3])
    masks = [_without_specks(labels == k + 1, area / 4) for k in range(len(palette))]
    near = [_grow(mask, 1) for mask in masks]
    layers = []
    for k, name in enumerate(present):
        others = (
            np.any([n for j, n in enumerate(near) if j != k], axis=0)
            if len(near) > 1
            else np.zeros_like(near[k])
        )
        direction = palette[k] - backdrop
        share = _dot(video - backdrop, direction) / np.maximum(_dot(direction, direction), 1)
        alpha = np.where(near[k] & ~others, np.clip(share, 0, 1), masks[k]).astype(np.float32)
        layers.append(Layer(colour=name, mask=masks[k], alpha=alpha, crowded=masks[k] & others))
    return layers


def _saturation(video: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(video, -1, 0)
    return np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _distances(video: np.ndarray, backdrop: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Squared distances in RGB to the background and to each colour: [1 + k, t, h, w]."""
    red, green, blue = (np.ascontiguousarray(plane) for plane in np.moveaxis(video, -1, 0))
    squares = [(red - r) ** 2 + (green - g) ** 2 + (blue - b) ** 2 for r, g, b in palette]
    offset = video - backdrop
    return np.stack([_dot(offset, offset), *squares])


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Mask dilated by `pixels` within each frame, diagonals included."""
    size = 2 * pixels + 1
    return ndimage.maximum_filter(mask.astype(np.uint8), (1, size, size)).astype(bool)


def _nearest(colour: np.ndarray, named) -> str:
    names = list(named)
    return names[int(np.argmin([np.linalg.norm(colour - np.asarray(named[name])) for name in names]))]


def _present_colours(video: np.ndarray, backdrop: np.ndarray) -> dict[str, np.ndarray]:
    """Core pixels of each colour present, the largest colour first.

    The blurred rim of an object can look like another colour (red on white is pink there), so pixels next to
    a larger object do not count for a smaller one.
    """
    distances = _distances(video, backdrop, np.asarray(list(COLOURS.values()), np.float32))
    nearest = np.where(distances.min(axis=0) < COLOUR_RADIUS**2, distances.argmin(axis=0), -1)
    cores = {name: nearest == k + 1 for k, name in enumerate(COLOURS)}
    enough = smallest_area(*video.shape[1:3])
    taken = np.zeros(video.shape[:3], bool)
    present = {}
    for name in sorted(cores, key=lambda n: -int(cores[n].sum())):
        core = _without_specks(cores[name] & ~taken, enough / 4)
        frames = core.sum(axis=(1, 2))
        if (frames > enough).mean() >= 0.25:
            present[name] = core
            taken |= _grow(core, 2)
    return present


def _typical(video: np.ndarray, core: np.ndarray, named: tuple[int, int, int]) -> np.ndarray:
    """Colour inside an object as rendered: the mean of its measured and its named colour."""
    measured = np.median(video[core], axis=0)
    return (measured + np.asarray(named, np.float32)) / 2


def _without_specks(mask: np.ndarray, area: float) -> np.ndarray:
    """Drops connected pieces (within a frame) of fewer than `area` pixels."""
    if not mask.any():
        return mask
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = True
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, structure, output=labels)
    sizes = np.bincount(labels.ravel())
    keep = sizes >= area
    keep[0] = False
    return keep[labels]
