"""Renders a scene, with its ground truth.

Objects are blended over the background by their coverage of each pixel, computed from a signed distance;
only the pixels near an object are touched.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vidgen.core.typing import Float, UInt8
from vidgen.data.sprites.attributes import BACKGROUND_COLOURS, COLOURS, RGB, Backdrop, Shape
from vidgen.data.sprites.motion import CameraPath, Path, SpriteObject, camera_path, object_path
from vidgen.data.sprites.scene import Background, Scene
from vidgen.data.sprites.shapes import outline, reach, signed_distance

__all__ = ["Rendering", "coverage", "render"]

WAVES = 8
WAVE_CONTRAST = 7.0
WAVE_CYCLES = (2.0, 7.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendering:
    """A rendered clip with its ground truth.

    Attributes:
        video: 8-bit RGB.
        boxes: (y0, x0, y1, x1) of each object in each frame, in [0, 1] of the frame; zeros if the object is
            outside.
        visibility: share of an object's area that is inside the frame and not behind another object,
            in [0, 1].
    """

    video: UInt8[np.ndarray, "t h w 3"]
    boxes: Float[np.ndarray, "n t 4"]
    visibility: Float[np.ndarray, "n t"]


def render(scene: Scene, *, num_frames: int, height: int, width: int, fps: float) -> Rendering:
    """Renders a scene from time zero, at any frame rate and size.

    The frame should have the aspect ratio of `scene.extent`; motions continue beyond `scene.duration`.
    """
    seconds = np.arange(num_frames) / fps
    camera = camera_path(scene.camera, seconds, scene.duration, scene.extent)
    paths = [camera.to_screen(object_path(o, seconds, scene.duration), scene.extent) for o in scene.objects]
    layers = [coverage(o.shape, p, min(height, width)) for o, p in zip(scene.objects, paths, strict=True)]
    background = np.clip(_background(scene, camera, height, width) + 0.5, 0, 255).astype(np.uint8)
    video = np.empty((num_frames, height, width, 3), np.uint8)
    video[:] = np.ascontiguousarray(np.broadcast_to(background, (len(background), height, width, 3)))
    for item, layer in reversed(list(zip(scene.objects, layers, strict=True))):
        _paint(video, COLOURS[item.colour], *layer)
    clear = np.ones((num_frames, height, width), np.float32)
    return Rendering(
        video=video,
        boxes=np.stack([_boxes(o, p, scene.extent) for o, p in zip(scene.objects, paths, strict=True)]),
        visibility=np.stack([_hide(clear, *layer) for layer in layers]),
    )


def coverage(shape: Shape, path: Path, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the pixels around an object.

    Args:
        shape: shape of the object.
        path: position, radius and angle of the object in the frame.
        unit: pixels per unit of length.

    Returns:
        Coverage float32 [t, n, n] in [0, 1], and the pixel (y, x) of its top left corner in each frame, int
        [t, 2], which may be outside the frame.
    """
    centre, radius = path.position * unit - 0.5, path.radius * unit
    half = float(radius.max()) * reach(shape) + 1
    corner = np.ceil(centre - half).astype(int)
    steps = np.arange(int(2 * half) + 1)
    offset = (corner - centre)[:, :, None] + steps
    scale = (1 / radius)[:, None]
    y, x = ((offset[:, k] * scale).astype(np.float32) for k in (0, 1))
    y, x = y[:, :, None], x[:, None, :]
    if path.angle.any():
        cos, sin = (f(path.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        y, x = y * cos - x * sin, y * sin + x * cos
    distance = signed_distance(shape, y, x) * radius.astype(np.float32)[:, None, None]
    return np.clip(0.5 - distance, 0, 1), corner


def _windows(shape: tuple[int, ...], covered: np.ndarray, corner: np.ndarray) -> Iterator[tuple]:
    """Yields the slices of the frames that a layer covers, with the matching slices of the layer."""
    height, width = shape[1:3]
    size = covered.shape[1]
    for k, (top, left) in enumerate(corner.tolist()):
        y0, y1, x0, x1 = max(top, 0), min(top + size, height), max(left, 0), min(left + size, width)
        if y0 < y1 and x0 < x1:
            inside = (k, slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
            yield (k, slice(y0, y1), slice(x0, x1)), inside


def _paint(video: np.ndarray, colour: RGB, covered: np.ndarray, corner: np.ndarray) -> None:
    """Blends an object over the video, in place."""
    target = np.asarray(colour, np.float32)
    for window, inside in _windows(video.shape, covered, corner):
        patch, alpha = video[window], covered[inside][..., None]
        video[window] = patch + alpha * (target - patch) + 0.5


def _hide(clear: np.ndarray, covered: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Removes an object from the unobstructed area, in place; returns the visible share of the object."""
    seen = np.zeros(len(covered), np.float32)
    for window, inside in _windows(clear.shape, covered, corner):
        alpha = covered[inside] * clear[window]
        clear[window] -= alpha
        seen[window[0]] = alpha.sum()
    return seen / np.maximum(covered.sum(axis=(1, 2)), 1e-6)


def _boxes(item: SpriteObject, path: Path, extent: tuple[float, float]) -> np.ndarray:
    points = outline(item.shape)
    cos, sin = np.cos(path.angle)[:, None], np.sin(path.angle)[:, None]
    rotated = np.stack(
        [points[:, 0] * cos + points[:, 1] * sin, points[:, 1] * cos - points[:, 0] * sin], axis=-1
    )
    corners = (path.position[:, None] + rotated * path.radius[:, None, None]) / np.asarray(extent)[None, None]
    boxes = np.clip(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1), 0, 1)
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return np.where(inside[:, None], boxes, 0).astype(np.float32)


def _background(scene: Scene, camera: CameraPath, height: int, width: int) -> np.ndarray:
    """Background colours in [0, 255], broadcastable to [t, h, w, 3]."""
    background = scene.background
    colour = np.asarray(BACKGROUND_COLOURS[background.colour], np.float32)
    match background.kind:
        case Backdrop.PLAIN:
            return colour[None, None, None]
        case Backdrop.GRADIENT:
            assert background.colour_below is not None
            below = np.asarray(BACKGROUND_COLOURS[background.colour_below], np.float32)
            share = ((np.arange(height, dtype=np.float32) + 0.5) / height)[None, :, None, None]
            return colour[None, None, None] * (1 - share) + below[None, None, None] * share
        case Backdrop.TEXTURED:
            waves = _texture(background, scene.extent, camera, height, width)
            return np.clip(colour[None, None, None] + waves[..., None], 0, 255)


def _texture(
    background: Background, extent: tuple[float, float], camera: CameraPath, height: int, width: int
) -> np.ndarray:
    """Sum of plane waves, fixed to the world: float32 [t or 1, h, w], added equally to all channels."""
    rng = np.random.default_rng(background.texture_seed)
    heading, phase = rng.uniform(0, 2 * np.pi, (2, 1, WAVES, 1))
    frequency = 2 * np.pi * rng.uniform(*WAVE_CYCLES, (1, WAVES, 1))
    if not camera.offset.any() and np.ptp(camera.zoom) == 0:
        camera = dataclasses.replace(camera, offset=camera.offset[:1], zoom=camera.zoom[:1])
    arguments = []
    for axis, (count, component) in enumerate(((height, np.sin(heading)), (width, np.cos(heading)))):
        centre = extent[axis] / 2
        pixels = (np.arange(count) + 0.5) / count * extent[axis]
        world = (pixels[None] - centre) / camera.zoom[:, None] + centre + camera.offset[:, axis, None]
        arguments.append(frequency * component * world[:, None, :])
    along_y, along_x = arguments[0] + phase, arguments[1]
    basis_y = np.concatenate([np.cos(along_y), -np.sin(along_y)], axis=1).astype(np.float32)
    basis_x = np.concatenate([np.cos(along_x), np.sin(along_x)], axis=1).astype(np.float32)
    return WAVE_CONTRAST * np.matmul(basis_y.transpose(0, 2, 1), basis_x)
