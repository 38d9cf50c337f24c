"""Positions of objects and camera over time, as functions of seconds, not of frames.

Coordinates are (y, x) in units of the shorter side of the frame, y pointing down, angles clockwise.
"""

import dataclasses

import numpy as np

from vidgen.core.typing import Float
from vidgen.data.sprites.attributes import DIAMETERS, Camera, Motion, Shape, Size
from vidgen.data.sprites.shapes import reach

__all__ = ["DIRECTIONS", "CameraPath", "Path", "SpriteObject", "camera_path", "object_path"]

DIRECTIONS = {Motion.LEFT: (0, -1), Motion.RIGHT: (0, 1), Motion.UP: (-1, 0), Motion.DOWN: (1, 0)}
GROWTH = 2.4
"""Ratio of an object's last diameter to its first in `grow`."""
ZOOM = 1.3
"""Ratio of the larger to the smaller magnification in a camera zoom."""
PAN = 0.2
"""Distance of a camera pan, as a share of the frame's width."""
TURNS_PER_SECOND = 0.5
SECONDS_PER_BOUNCE, SECONDS_PER_ORBIT = 1.0, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpriteObject:
    """One object of a scene.

    Attributes:
        start: (y, x) at time zero; for `orbit` the centre of the circle, for `bounce` the lowest point.
        travel: path length of a straight motion, height of a bounce or radius of an orbit.
        phase: angle on the orbit at time zero, in radians.
        clockwise: direction of `orbit` and `spin`.
    """

    shape: Shape
    colour: str
    size: Size
    motion: Motion
    start: tuple[float, float] = (0.5, 0.5)
    travel: float = 0.4
    phase: float = 0.0
    clockwise: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """Trajectory of an object: `position` (y, x), `radius` of the unit shape, and `angle` in radians."""

    position: Float[np.ndarray, "t 2"]
    radius: Float[np.ndarray, " t"]
    angle: Float[np.ndarray, " t"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CameraPath:
    """Trajectory of the camera: displacement of its centre, and magnification."""

    offset: Float[np.ndarray, "t 2"]
    zoom: Float[np.ndarray, " t"]

    def to_screen(self, path: Path, extent: tuple[float, float]) -> Path:
        """Path as seen in a frame of size `extent`."""
        centre = np.asarray(extent)[None, :] / 2
        position = (path.position - centre - self.offset) * self.zoom[:, None] + centre
        return Path(position=position, radius=path.radius * self.zoom, angle=path.angle)


def object_path(item: SpriteObject, seconds: Float[np.ndarray, " t"], duration: float) -> Path:
    """Position, radius and angle of an object at the given times of a clip of `duration` seconds.

    Straight motions and changes of size span the whole clip, so that they are as visible in a short clip as
    in a long one.
    """
    progress = seconds / duration if duration else np.zeros_like(seconds)
    sense = 1 if item.clockwise else -1
    offset = np.zeros((len(seconds), 2))
    scale, angle = np.ones_like(progress), np.zeros_like(progress)
    match item.motion:
        case Motion.LEFT | Motion.RIGHT | Motion.UP | Motion.DOWN:
            offset = item.travel * progress[:, None] * np.array([DIRECTIONS[item.motion]])
        case Motion.BOUNCE:
            bounces = max(1, round(duration / SECONDS_PER_BOUNCE))
            offset[:, 0] = -item.travel * np.abs(np.sin(np.pi * bounces * progress))
        case Motion.ORBIT:
            turns = max(1, round(duration / SECONDS_PER_ORBIT))
            phase = item.phase + sense * 2 * np.pi * turns * progress
            offset = item.travel * np.stack([np.sin(phase), np.cos(phase)], axis=-1)
        case Motion.GROW:
            scale = GROWTH ** (progress - 0.5) if duration else scale
        case Motion.SHRINK:
            scale = GROWTH ** (0.5 - progress) if duration else scale
        case Motion.SPIN:
            angle = sense * 2 * np.pi * TURNS_PER_SECOND * seconds
        case Motion.STILL:
            pass
    radius = DIAMETERS[item.size] / 2 * scale
    return Path(position=np.asarray([item.start]) + offset, radius=radius, angle=angle)


def camera_path(
    camera: Camera, seconds: Float[np.ndarray, " t"], duration: float, extent: tuple[float, float]
) -> CameraPath:
    """Offset and magnification of the camera, both neutral at half time."""
    progress = seconds / duration - 0.5 if duration else np.zeros_like(seconds)
    offset, zoom = np.zeros((len(seconds), 2)), np.ones_like(progress)
    match camera:
        case Camera.PAN_LEFT:
            offset[:, 1] = -PAN * extent[1] * progress
        case Camera.PAN_RIGHT:
            offset[:, 1] = PAN * extent[1] * progress
        case Camera.ZOOM_IN:
            zoom = ZOOM**progress
        case Camera.ZOOM_OUT:
            zoom = ZOOM**-progress
        case Camera.STATIC:
            pass
    return CameraPath(offset=offset, zoom=zoom)


def reach_radius(item: SpriteObject, path: Path) -> Float[np.ndarray, " t"]:
    """Radius of a circle around the position that contains the object."""
    return path.radius * reach(item.shape)
