"""The sprite world as a source of clips."""

import dataclasses
import enum
import json
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.data.buckets import Bucket, with_size
from vidgen.data.sprites.attributes import Backdrop, Camera, Motion, Size
from vidgen.data.sprites.captions import caption
from vidgen.data.sprites.render import render
from vidgen.data.sprites.scene import Scene, World, sample_scene
from vidgen.data.training_data import VideoData

__all__ = ["SpritesData", "SpritesSource"]

MAX_OBJECTS = 3

E = TypeVar("E", bound=enum.StrEnum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpritesData(VideoData):
    """Options of the sprite world.

    Attributes:
        kind: selects this kind of data in a config.
        num_clips: number of clips; clip i does not depend on it.
        seed: seed of all clips.
        num_frames: frames of a clip; 1 makes images, captioned without motion.
        height: pixels.
        width: pixels.
        buckets: sizes of training clips. If empty, training uses the size `num_frames`, `height` and `width`;
            otherwise that is the size of held-out clips and previews.
        fps: frames per second.
        min_objects: fewest objects in a clip.
        max_objects: most objects in a clip, up to 3.
        motions: names of `Motion` to draw from; empty for all.
        sizes: names of `Size` to draw from; empty for all.
        backgrounds: names of `Backdrop` to draw from; empty for all.
        cameras: names of `Camera` to draw from; empty for all. A moving camera is visible only on a textured
            background.
        split: `train` excludes the held-out pairs of colour and shape, `heldout` has no others, `all`
            has every pair.

    Raises:
        UserError: a name is unknown or a number out of range.
    """

    kind: Literal["sprites"] = "sprites"
    num_clips: int = 100_000
    seed: Annotated[int, limits.SEED] = 0
    num_frames: Annotated[int, limits.NUM_FRAMES] = 17
    height: Annotated[int, limits.SIDE] = 64
    width: Annotated[int, limits.SIDE] = 64
    buckets: tuple[Bucket, ...] = ()
    fps: Annotated[float, limits.FPS] = 8.0
    min_objects: int = 1
    max_objects: int = 3
    motions: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    split: Literal["train", "heldout", "all"] = "train"

    def __post_init__(self):
        limits.check_fields(self, "sprites")
        if self.num_clips < 1:
            raise UserError(f"sprites: num_clips is {self.num_clips}; expected a positive number")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise UserError(
                f"sprites: min_objects is {self.min_objects} and max_objects {self.max_objects}; "
                f"expected 1 <= min_objects <= max_objects <= {MAX_OBJECTS}"
            )
        world = self.world()
        moving_only = world.cameras and Camera.STATIC not in world.cameras
        if moving_only and world.backgrounds != (Backdrop.TEXTURED,):
            raise UserError(
                f"sprites: cameras are {self.cameras} on backgrounds {self.backgrounds or 'of all kinds'}; "
                'a moving camera shows only on a texture: add "static" or set backgrounds to ("textured",)'
            )

    def world(self) -> World:
        """Choices passed to `sample_scene`."""
        return World(
            min_objects=self.min_objects,
            max_objects=self.max_objects,
            motions=_parse("motions", self.motions, Motion),
            sizes=_parse("sizes", self.sizes, Size),
            backgrounds=_parse("backgrounds", self.backgrounds, Backdrop),
            cameras=_parse("cameras", self.cameras, Camera),
            split=self.split,
        )

    def source(self) -> "SpritesSource":
        """The clips."""
        return SpritesSource(self)

    def bucket_sources(self) -> tuple["SpritesSource", ...]:
        """The clips of each bucket."""
        return tuple(with_size(self, bucket).source() for bucket in self.buckets)

    def heldout(self) -> "SpritesData":
        return dataclasses.replace(self, split="heldout")

    def heldout_scenes(self) -> "SpritesSource":
        return self.heldout().source()


class SpritesSource:
    """Clips of the sprite world, rendered on demand; clip i depends only on the options and (seed, i)."""

    def __init__(self, options: SpritesData):
        self.options = options
        self._world = options.world()
        short = min(options.height, options.width)
        self._extent = (options.height / short, options.width / short)

    def __len__(self) -> int:
        return self.options.num_clips

    def scene(self, index: int) -> Scene:
        """Ground truth of clip `index`."""
        duration = (self.options.num_frames - 1) / self.options.fps
        return sample_scene(self._world, self._generator(index, 0), self._extent, duration)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one clip.

        Returns:
            `video` uint8 [t h w 3], `caption`, `name`, `boxes` float32 [max_objects t 4] as (y0, x0, y1, x1)
            in [0, 1] with zeros for absent objects, `visibility` float32 [max_objects t], and `attributes`,
            the scene as JSON.

        Raises:
            IndexError: the index is out of range.
        """
        options, scene = self.options, self.scene(index)
        drawn = render(
            scene, num_frames=options.num_frames, height=options.height, width=options.width, fps=options.fps
        )
        absent = options.max_objects - len(scene.objects)
        return {
            "video": drawn.video,
            "caption": caption(scene, self._generator(index, 1)),
            "name": f"sprites-{options.seed}-{index}",
            "boxes": np.pad(drawn.boxes, ((0, absent), (0, 0), (0, 0))),
            "visibility": np.pad(drawn.visibility, ((0, absent), (0, 0))),
            "attributes": json.dumps(dataclasses.asdict(scene)),
        }

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"sprites: clip {index} of {len(self)}")
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.options.seed, int(index), stream]))
        )


def _parse(option: str, names: tuple[str, ...], kind: type[E]) -> tuple[E, ...]:
    valid = [str(member) for member in kind]
    for name in names:
        if name not in valid:
            raise UserError(f"sprites: {option} has {name!r}; expected any of {', '.join(valid)}")
    return tuple(kind(name) for name in names)
