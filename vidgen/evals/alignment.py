"""Agreement of videos with prompts, measured in the sprite world, where both can be read exactly."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import optimize

from vidgen.core.errors import UserError
from vidgen.core.typing import UInt8
from vidgen.data.sprites.captions import canonical
from vidgen.data.sprites.motion import DIRECTIONS, SpriteObject
from vidgen.data.sprites.scene import Scene
from vidgen.evals.detectors import Detection, ObjectReading, detect

__all__ = ["compare", "evaluate_alignment", "format_alignment", "score_alignment"]

ATTRIBUTES = ("colour", "shape", "size", "motion", "direction", "count", "background", "backdrop", "all")
MISMATCH = {"colour": 4.0, "shape": 2.0, "motion": 0.5, "size": 0.25}
"""Cost per attribute of matching a detected object to a requested one; colour and shape decide, the others
break ties."""


def evaluate_alignment(
    generate: Callable[[list[str]], UInt8[np.ndarray, "b t h w 3"]],
    scenes: Sequence[Scene],
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """Generates a video for the caption of each scene, and scores the attributes detected in it.

    Args:
        generate: returns one 8-bit video per prompt.
        scenes: requested scenes, described by `canonical`.
        batch_size: prompts per call.

    Returns:
        The table of `score_alignment`.

    Raises:
        UserError: there are no scenes, or `generate` does not return one video per prompt.
    """
    results = []
    for start in range(0, len(scenes), batch_size):
        requested = scenes[start : start + batch_size]
        videos = generate([canonical(scene) for scene in requested])
        if len(videos) != len(requested):
            raise UserError(
                f"generate made {len(videos)} videos for {len(requested)} prompts; expected one for each"
            )
        results += [compare(scene, detect(np.asarray(v))) for scene, v in zip(requested, videos, strict=True)]
    return _table(results)


def score_alignment(
    scenes: Sequence[Scene], videos: Sequence[UInt8[np.ndarray, "t h w 3"]]
) -> dict[str, float]:
    """Share of requested attributes that the videos show, per attribute, in [0, 1].

    `colour`, `shape`, `size` and `motion` are over requested objects; a missing object fails all four.
    `direction` is `motion` over the objects requested to go left, right, up or down. `count`, `background`
    (its colour or colours), `backdrop` (plain, gradient or textured) and `all` (everything right at once) are
    over clips. Attributes that no scene requests are left out. `num_clips` is the number of clips.

    Raises:
        UserError: there are no scenes, or not one video per scene.
    """
    if len(scenes) != len(videos):
        raise UserError(f"there are {len(videos)} videos for {len(scenes)} scenes; expected one for each")
    return _table([compare(scene, detect(v)) for scene, v in zip(scenes, videos, strict=True)])


def compare(scene: Scene, found: Detection) -> dict[str, list[bool]]:
    """Correctness per attribute for one clip: one value per requested object, or one for the clip."""
    answers: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for requested, detected in zip(scene.objects, _assign(scene.objects, found.objects), strict=True):
        for name in MISMATCH:
            if name == "motion" and not scene.duration:
                continue
            answers[name].append(detected is not None and getattr(detected, name) == getattr(requested, name))
        if requested.motion in DIRECTIONS and scene.duration:
            answers["direction"].append(answers["motion"][-1])
    expected, measured = scene.background, found.background
    answers["count"] = [len(found.objects) == len(scene.objects)]
    answers["background"] = [
        (measured.colour, measured.colour_below) == (expected.colour, expected.colour_below)
    ]
    answers["backdrop"] = [measured.kind == expected.kind]
    answers["all"] = [all(all(values) for values in answers.values())]
    return answers


def format_alignment(table: Mapping[str, float]) -> str:
    """Table as lines of text, in per cent."""
    lines = [f"{name:<12}{100 * table[name]:6.1f} %" for name in ATTRIBUTES if name in table]
    return "\n".join([*lines, f"{'clips':<12}{table['num_clips']:6.0f}"])


def _assign(
    requested: Sequence[SpriteObject], detected: Sequence[ObjectReading]
) -> list[ObjectReading | None]:
    """Detected object for each requested one, at the smallest total mismatch; None if it is missing."""
    matched: list[ObjectReading | None] = [None] * len(requested)
    if not detected:
        return matched
    cost = [
        [
            sum(price for name, price in MISMATCH.items() if getattr(r, name) != getattr(d, name))
            for d in detected
        ]
        for r in requested
    ]
    for i, j in zip(*optimize.linear_sum_assignment(np.array(cost)), strict=True):
        matched[i] = detected[j]
    return matched


def _table(results: Sequence[Mapping[str, list[bool]]]) -> dict[str, float]:
    if not results:
        raise UserError("there are no scenes to score; give at least one")
    pooled = {name: [answer for result in results for answer in result[name]] for name in ATTRIBUTES}
    table = {name: float(np.mean(answers)) for name, answers in pooled.items() if answers}
    return table | {"num_clips": float(len(results))}
