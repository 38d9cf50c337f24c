"""Drawing and its ground truth, checked against the pixels."""

import numpy as np
import pytest

from vidgen.data.sprites.attributes import BACKGROUND_COLOURS, COLOURS, Backdrop, Camera, Motion, Shape, Size
from vidgen.data.sprites.motion import SpriteObject
from vidgen.data.sprites.render import render
from vidgen.data.sprites.scene import Background, Scene
from vidgen.data.sprites.source import SpritesData


def make(*objects: SpriteObject, kind=Backdrop.PLAIN, colour="black", **rest) -> Scene:
    background = Background(kind=kind, colour=colour, texture_seed=5)
    return Scene(objects=objects, background=background, **rest)


def item(shape=Shape.CIRCLE, colour="red", size=Size.MEDIUM, motion=Motion.STILL, **rest) -> SpriteObject:
    return SpriteObject(shape=shape, colour=colour, size=size, motion=motion, **rest)


def share(frame, colour: str, behind: str = "black"):
    """How much of each pixel is of the colour, from the pixels alone."""
    target, base = np.array(COLOURS[colour], float), np.array(BACKGROUND_COLOURS[behind], float)
    return ((frame - base) @ (target - base)) / ((target - base) @ (target - base))


def centroid(video):
    """Centre of what differs from a plain background, per frame, in [0, 1]."""
    weight = np.abs(video.astype(float) - video[:1, :1, :1]).sum(axis=-1)
    y, x = (np.arange(n) / n for n in weight.shape[1:])
    total = weight.sum(axis=(1, 2))
    return np.stack([weight.sum(axis=2) @ y / total, weight.sum(axis=1) @ x / total], axis=-1)


@pytest.mark.parametrize("shape", list(Shape))
@pytest.mark.parametrize("motion", [Motion.STILL, Motion.SPIN])
def test_boxes_are_those_of_the_pixels(shape, motion):
    drawn = render(
        make(item(shape, motion=motion, size=Size.LARGE)), num_frames=5, height=96, width=96, fps=8.0
    )
    for frame, box in zip(drawn.video, drawn.boxes[0], strict=True):
        rows, columns = np.nonzero(share(frame, "red") > 0.5)
        pixels = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
        tolerance = 3.0 if motion is Motion.SPIN or shape not in (Shape.CIRCLE, Shape.SQUARE) else 1.0
        np.testing.assert_allclose(box * 96, pixels, atol=tolerance)  # a thin corner fades before it ends
        assert (box * 96 - pixels)[:2].max() < 0.6 and (pixels - box * 96)[2:].max() < 0.6


@pytest.mark.parametrize(
    ("shape", "area"),
    [(Shape.CIRCLE, np.pi), (Shape.SQUARE, 1.76**2), (Shape.RING, np.pi * (1.08**2 - 0.56**2))],
)
def test_coverage_adds_up_to_the_area(shape, area):
    frame = render(make(item(shape)), num_frames=1, height=64, width=64, fps=8.0).video[0]
    expected = area * (0.27 / 2 * 64) ** 2
    np.testing.assert_allclose(share(frame, "red").sum(), expected, rtol=0.02)


def test_edges_are_anti_aliased():
    frame = render(make(item(start=(0.5, 0.5))), num_frames=1, height=64, width=64, fps=8.0).video[0]
    red = share(frame, "red")
    partial = ((red > 0.1) & (red < 0.9)).sum()
    circumference = np.pi * 0.27 * 64
    assert 0.6 * circumference < partial < 1.6 * circumference
    shifted = render(make(item(start=(0.5, 0.503))), num_frames=1, height=64, width=64, fps=8.0).video[0]
    centre = [
        (share(f, "red").sum(axis=0) * np.arange(64)).sum() / share(f, "red").sum() for f in (frame, shifted)
    ]
    np.testing.assert_allclose(centre[1] - centre[0], 0.003 * 64, atol=0.02)


def test_visibility_under_occlusion_and_outside():
    near = item(Shape.SQUARE, "blue", Size.LARGE, start=(0.5, 0.5))
    behind = item(Shape.CIRCLE, "red", Size.SMALL, start=(0.5, 0.5))
    half = item(Shape.SQUARE, "green", Size.SMALL, start=(0.2, 1.0))
    drawn = render(make(near, behind, half), num_frames=2, height=64, width=64, fps=8.0)
    np.testing.assert_allclose(drawn.visibility[0], 1, atol=1e-5)
    np.testing.assert_allclose(drawn.visibility[1], 0, atol=1e-5)
    np.testing.assert_allclose(drawn.visibility[2], 0.5, atol=1e-3)
    np.testing.assert_allclose(drawn.boxes[2, 0, 3], 1)
    assert share(drawn.video[0], "red").max() < 0.5
    gone = render(make(item(start=(0.5, 2.0))), num_frames=1, height=64, width=64, fps=8.0)
    assert not gone.boxes.any() and not gone.visibility.any()


def test_partial_occlusion_is_measured_by_area():
    near = item(Shape.SQUARE, "blue", Size.LARGE, start=(0.5, 0.5))
    side = 0.88 * 0.39 / 2
    half = item(Shape.CIRCLE, "red", Size.SMALL, start=(0.5, 0.5 + side))
    drawn = render(make(near, half), num_frames=1, height=128, width=128, fps=8.0)
    np.testing.assert_allclose(drawn.visibility[1], 0.5, atol=0.01)


@pytest.mark.parametrize("motion", list(Motion))
def test_motion_is_as_told(motion):
    source = SpritesData(max_objects=1, motions=(motion.value,), backgrounds=("plain",)).source()
    for index in range(6):
        clip = source[index]
        box = clip["boxes"][0]
        centre, size = centroid(clip["video"]), (box[:, 2:] - box[:, :2]).max(axis=1)
        moved, span = centre[-1] - centre[0], np.ptp(centre, axis=0)
        np.testing.assert_allclose(clip["visibility"][0], 1, atol=1e-3)
        match motion:
            case Motion.LEFT | Motion.RIGHT:
                assert moved[1] * (1 if motion is Motion.RIGHT else -1) > 0.3 and span[0] < 2e-3
            case Motion.UP | Motion.DOWN:
                assert moved[0] * (1 if motion is Motion.DOWN else -1) > 0.3 and span[1] < 2e-3
            case Motion.BOUNCE:
                assert span[0] > 0.3 and span[1] < 2e-3 and abs(moved[0]) < 2e-3
            case Motion.ORBIT:
                assert span.min() > 0.3
            case Motion.GROW:
                assert size[-1] / size[0] > 2
            case Motion.SHRINK:
                assert size[-1] / size[0] < 0.5
            case Motion.SPIN | Motion.STILL:
                assert span.max() < 0.005
                still = np.array_equal(clip["video"][0], clip["video"][2])
                assert still == (motion is Motion.STILL)


def test_camera_moves_background_and_objects_together():
    scene = make(item(start=(0.3, 0.5)), kind=Backdrop.TEXTURED, colour="gray", camera=Camera.PAN_LEFT)
    drawn = render(scene, num_frames=6, height=80, width=80, fps=5.0)
    centre = drawn.boxes[0][:, [1, 3]].mean(axis=1)
    np.testing.assert_allclose(centre[-1] - centre[0], 0.2, atol=1e-3)
    before, after = drawn.video[0, :, :, 0].astype(float), drawn.video[-1, :, :, 0].astype(float)
    shift = round((centre[-1] - centre[0]) * 80)
    rows = slice(50, 80)
    assert (
        np.abs(after[rows, shift + 20 :] - before[rows, 20:-shift]).mean()
        < 4 * np.abs(after[rows] - before[rows]).mean()
    )


def test_zoom_enlarges():
    scene = make(item(), kind=Backdrop.TEXTURED, colour="gray", camera=Camera.ZOOM_IN)
    box = render(scene, num_frames=9, height=64, width=64, fps=8.0).boxes[0]
    size = box[:, 2] - box[:, 0]
    np.testing.assert_allclose(size[-1] / size[0], 1.3, rtol=1e-3)
