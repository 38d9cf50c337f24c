"""Scenes: the ground truth of clips, drawn deterministically from (seed, index)."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from vidgen.data.sprites.attributes import (
    BACKGROUND_COLOURS,
    Backdrop,
    Camera,
    Motion,
    Size,
    colour_shape_pairs,
)
from vidgen.data.sprites.motion import DIRECTIONS, SpriteObject, camera_path, object_path, reach_radius

__all__ = ["Background", "Scene", "World", "sample_scene"]

T = TypeVar("T")

MARGIN = 0.015
PLACEMENTS = 4
"""Start positions tried for each further object; the one with the least overlap is used, so some occlusion
remains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """Background of a scene.

    Attributes:
        colour: name of the colour; for a gradient, the colour at the top.
        colour_below: colour at the bottom of a gradient, else None.
        texture_seed: seed of the texture.
    """

    kind: Backdrop
    colour: str
    colour_below: str | None = None
    texture_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Ground truth of a clip.

    Attributes:
        objects: objects, the nearest to the camera first; their colours differ.
        extent: height and width of the frame in units of its shorter side.
        duration: seconds between the first and the last frame; zero for an image.
    """

    objects: tuple[SpriteObject, ...]
    background: Background
    camera: Camera = Camera.STATIC
    extent: tuple[float, float] = (1.0, 1.0)
    duration: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Choices from which scenes are drawn; an empty tuple means all."""

    min_objects: int = 1
    max_objects: int = 3
    motions: tuple[Motion, ...] = ()
    sizes: tuple[Size, ...] = ()
    backgrounds: tuple[Backdrop, ...] = ()
    cameras: tuple[Camera, ...] = ()
    split: str = "train"


def sample_scene(
    world: World, rng: np.random.Generator, extent: tuple[float, float], duration: float
) -> Scene:
    """Draws a scene; equal generators give equal scenes."""
    background = _sample_background(world, rng)
    camera = Camera.STATIC
    if background.kind is Backdrop.TEXTURED and duration:
        cameras = world.cameras or tuple(Camera)
        moving = tuple(c for c in cameras if c is not Camera.STATIC)
        still = Camera.STATIC in cameras and (not moving or rng.random() < 0.5)
        camera = Camera.STATIC if still else _choice(rng, moving)
    scene = Scene(objects=(), background=background, camera=camera, extent=extent, duration=duration)
    for _ in range(int(rng.integers(world.min_objects, world.max_objects + 1))):
        item = _sample_object(world, rng, scene)
        scene = dataclasses.replace(scene, objects=(*scene.objects, _place(item, rng, scene)))
    return scene


def _choice(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _sample_background(world: World, rng: np.random.Generator) -> Background:
    kind = _choice(rng, world.backgrounds or tuple(Backdrop))
    first, second = (
        list(BACKGROUND_COLOURS)[k] for k in rng.choice(len(BACKGROUND_COLOURS), 2, replace=False)
    )
    texture_seed = int(rng.integers(2**31))
    return Background(
        kind=kind,
        colour=first,
        colour_below=second if kind is Backdrop.GRADIENT else None,
        texture_seed=texture_seed if kind is Backdrop.TEXTURED else 0,
    )


def _sample_object(world: World, rng: np.random.Generator, scene: Scene) -> SpriteObject:
    """Draws an object without its position: a motion, an unused colour, a shape that shows the motion."""
    motion = _choice(rng, world.motions or tuple(Motion))
    taken = {item.colour for item in scene.objects}
    pairs = [
        (colour, shape)
        for colour, shape in colour_shape_pairs(world.split)
        if colour not in taken and not (motion is Motion.SPIN and shape.is_round)
    ]
    colour, shape = _choice(rng, pairs)
    share = rng.uniform(0.36, 0.44)
    if motion in DIRECTIONS:
        travel = share * float(np.abs(np.multiply(DIRECTIONS[motion], scene.extent)).sum())
    else:
        travel = share if motion is Motion.BOUNCE else share / 2
    return SpriteObject(
        shape=shape,
        colour=colour,
        size=_choice(rng, world.sizes or tuple(Size)),
        motion=motion,
        travel=travel,
        phase=float(rng.uniform(0, 2 * np.pi)),
        clockwise=bool(rng.random() < 0.5),
    )


def _place(item: SpriteObject, rng: np.random.Generator, scene: Scene) -> SpriteObject:
    """Chooses a start position that keeps the path inside the frame, away from the objects placed before."""
    seconds = np.linspace(0, scene.duration, 24)
    camera = camera_path(scene.camera, seconds, scene.duration, scene.extent)
    path = object_path(dataclasses.replace(item, start=(0.0, 0.0)), seconds, scene.duration)
    relative = path.position - camera.offset
    radius = reach_radius(item, path) * camera.zoom
    low = (radius[:, None] - relative).max(axis=0) + MARGIN
    high = (np.asarray([scene.extent]) - radius[:, None] - relative).min(axis=0) - MARGIN
    low, high = np.minimum(low, (low + high) / 2), np.maximum(high, (low + high) / 2)
    starts = rng.uniform(low, high, size=(PLACEMENTS, 2))
    gap = np.zeros(PLACEMENTS)
    for other in scene.objects:
        other_path = object_path(other, seconds, scene.duration)
        distance = np.linalg.norm(starts[:, None] + (path.position - other_path.position)[None], axis=-1)
        clearance = distance - (path.radius + other_path.radius)[None]
        gap = gap + np.minimum(clearance, 0).mean(axis=1)
    y, x = starts[int(gap.argmax())]
    return dataclasses.replace(item, start=(float(y), float(x)))
