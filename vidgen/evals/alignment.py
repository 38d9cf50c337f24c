"""Does the video do what the prompt says? Measured in the sprite world, where both can be read exactly."""

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
"""Cost of taking an object found for the one asked for; colour and shape decide, the others break ties."""


def evaluate_alignment(
    generate: Callable[[list[str]], UInt8[np.ndarray, "b t h w 3"]],
    scenes: Sequence[Scene],
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """Ask for each scene in words, and read from the pixels what was made.

    Args:
        generate: makes one 8-bit video per prompt.
        scenes: what to ask for, worded by `canonical`.
        batch_size: prompts per call.

    Returns:
        The table of `score_alignment`.

    Raises:
        UserError: there are no scenes, or a batch has another number of videos than prompts.
    """
    results = []
    for start in range(0, len(scenes), batch_size):
        asked = scenes[start : start + batch_size]
        videos = generate([canonical(scene) for scene in asked])
        if len(videos) != len(asked):
            raise UserError(
                f"generate made {len(videos)} videos for {len(asked)} prompts; expected one for each"
            )
        results += [compare(scene, detect(np.asarray(v))) for scene, v in zip(asked, videos, strict=True)]
    return _table(results)


def score_alignment(
    scenes: Sequence[Scene], videos: Sequence[UInt8[np.ndarray, "t h w 3"]]
) -> dict[str, float]:
    """Share of what was asked for that is there, per attribute, in [0, 1].

    `colour`, `shape`, `size` and `motion` are over the objects asked for, and an object that is missing fails
    them all; `direction` is `motion` of those asked to go left, right, up or down. `count`, `background` (its
    colour or colours), `backdrop` (plain, gradient or textured) and `all` (everything right at once) are over
    clips. An attribute that nothing asked for is left out. `num_clips` is how many clips there were.

    Raises:
        UserError: there are no scenes, or not one video for each.
    """
    if len(scenes) != len(videos):
        raise UserError(f"there are {len(videos)} videos for {len(scenes)} scenes; expected one for each")
    return _table([compare(scene, detect(v)) for scene, v in zip(scenes, videos, strict=True)])


def compare(scene: Scene, found: Detection) -> dict[str, list[bool]]:
    """Answers per attribute for one clip: one for each object asked for, or one for the clip."""
    answers: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for asked, seen in zip(scene.objects, _assign(scene.objects, found.objects), strict=True):
        for name in MISMATCH:
            if name == "motion" and not scene.duration:
                continue
            answers[name].append(seen is not None and getattr(seen, name) == getattr(asked, name))
        if asked.motion in DIRECTIONS and scene.duration:
            answers["direction"].append(answers["motion"][-1])
    truth, seen = scene.background, found.background
    answers["count"] = [len(found.objects) == len(scene.objects)]
    answers["background"] = [(seen.colour, seen.colour_below) == (truth.colour, truth.colour_below)]
    answers["backdrop"] = [seen.kind == truth.kind]
    answers["all"] = [all(all(values) for values in answers.values())]
    return answers


def format_alignment(table: Mapping[str, float]) -> str:
    """The table as lines of text, in per cent."""
    lines = [f"{name:<12}{100 * table[name]:6.1f} %" for name in ATTRIBUTES if name in table]
    return "\n".join([*lines, f"{'clips':<12}{table['num_clips']:6.0f}"])


def _assign(asked: Sequence[SpriteObject], seen: Sequence[ObjectReading]) -> list[ObjectReading | None]:
    """The object found for each one asked for, so that together they differ least."""
    matched: list[ObjectReading | None] = [None] * len(asked)
    if not seen:
        return matched
    cost = [
        [sum(price for name, price in MISMATCH.items() if getattr(a, name) != getattr(s, name)) for s in seen]
        for a in asked
    ]
    for i, j in zip(*optimize.linear_sum_assignment(np.array(cost)), strict=True):
        matched[i] = seen[j]
    return matched


def _table(results: Sequence[Mapping[str, list[bool]]]) -> dict[str, float]:
    if not results:
        raise UserError("there are no scenes to score; give at least one")
    pooled = {name: [answer for result in results for answer in result[name]] for name in ATTRIBUTES}
    table = {name: float(np.mean(answers)) for name, answers in pooled.items() if answers}
    return table | {"num_clips": float(len(results))}
