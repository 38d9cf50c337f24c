"""Captions of scenes: a small grammar with paraphrases, all true of the scene."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from vidgen.data.sprites.attributes import Backdrop, Camera, Motion
from vidgen.data.sprites.motion import SpriteObject
from vidgen.data.sprites.scene import Background, Scene

__all__ = ["canonical", "caption"]

SIZE_OMITTED = 0.25

OPENINGS = ("", "", "", "a video of ", "a clip of ", "a short animation of ")

MOTIONS: Mapping[Motion, tuple[str, ...]] = MappingProxyType(
    {
        Motion.LEFT: (
            "moving left",
            "moving to the left",
            "sliding left",
            "drifting to the left",
            "going left",
        ),
        Motion.RIGHT: (
            "moving right",
            "moving to the right",
            "sliding right",
            "drifting to the right",
            "going right",
        ),
        Motion.UP: ("moving up", "rising", "going up", "moving upwards", "floating up"),
        Motion.DOWN: ("moving down", "falling", "going down", "moving downwards", "sinking down"),
        Motion.BOUNCE: ("bouncing up and down", "bouncing", "bouncing on the spot"),
        Motion.ORBIT: ("orbiting", "circling around", "moving around in a loop"),
        Motion.GROW: ("growing", "growing larger", "getting bigger"),
        Motion.SHRINK: ("shrinking", "shrinking in size", "getting smaller"),
        Motion.SPIN: ("spinning", "rotating", "turning around its centre"),
        Motion.STILL: ("standing still", "not moving", "staying in place"),
    }
)

BACKDROPS: Mapping[Backdrop, tuple[str, ...]] = MappingProxyType(
    {
        Backdrop.PLAIN: (
            "on a {0} background",
            "on plain {0}",
            "against a {0} background",
            "over a plain {0} background",
        ),
        Backdrop.GRADIENT: (
            "on a gradient background from {0} at the top to {1} at the bottom",
            "on a gradient from {0} to {1}",
            "against a background fading from {0} down to {1}",
        ),
        Backdrop.TEXTURED: (
            "on a textured {0} background",
            "on a rough {0} surface",
            "against a mottled {0} background",
        ),
    }
)

CAMERAS: Mapping[Camera, tuple[str, ...]] = MappingProxyType(
    {
        Camera.STATIC: ("",),
        Camera.PAN_LEFT: (", the camera pans left", ", camera panning to the left"),
        Camera.PAN_RIGHT: (", the camera pans right", ", camera panning to the right"),
        Camera.ZOOM_IN: (", the camera zooms in", ", camera zooming in"),
        Camera.ZOOM_OUT: (", the camera zooms out", ", camera zooming out"),
    }
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in a random wording, which may omit sizes. Images get no motion and no camera."""

    def choose(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    phrases = [
        _noun(item, sized=rng.random() >= SIZE_OMITTED) + _motion(scene, choose(MOTIONS[item.motion]))
        for item in scene.objects
    ]
    camera = choose(CAMERAS[scene.camera])
    return choose(OPENINGS) + _join(phrases) + " " + _backdrop(scene.background, choose) + camera


def canonical(scene: Scene) -> str:
    """The plain wording with all attributes, as a prompt for evaluation."""
    phrases = [_noun(item, sized=True) + _motion(scene, MOTIONS[item.motion][0]) for item in scene.objects]
    backdrop = _backdrop(scene.background, lambda options: options[0])
    return _join(phrases) + " " + backdrop + CAMERAS[scene.camera][0]


def _noun(item: SpriteObject, *, sized: bool) -> str:
    words = ([str(item.size)] if sized else []) + [item.colour, str(item.shape)]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _motion(scene: Scene, words: str) -> str:
    return f" {words}" if scene.duration else ""


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _backdrop(background: Background, choose) -> str:
    return choose(BACKDROPS[background.kind]).format(background.colour, background.colour_below)
