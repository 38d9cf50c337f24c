import numpy as np
import pytest
from PIL import ExifTags, Image

from vidgen.data.source import BrokenClip
from vidgen.data.video_reader import probe, read_clip


def corner(height=20, width=30):
    """White where the picture's top left is, blue elsewhere."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[: height // 2, : width // 2] = 255
    return pixels


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_an_image_is_a_clip_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(corner()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_clip(path), corner()[None])
    info = probe(path)
    assert (info.width, info.height, info.num_frames, info.duration, info.is_image) == (30, 20, 1, 0.0, True)


def test_jpeg(tmp_path):
    Image.fromarray(corner()).save(tmp_path / "a.JPG", format="JPEG", quality=95, subsampling=0)
    seen = read_clip(tmp_path / "a.JPG")[0].astype(int)
    assert abs(seen - corner())[[4, 4, 15], [4, 25, 15]].max() <= 12


@pytest.mark.parametrize(
    ("orientation", "row", "column"),
    [(1, 0, 0), (2, 0, -1), (3, -1, -1), (4, -1, 0), (5, 0, 0), (6, 0, -1), (7, -1, -1), (8, -1, 0)],
)
def test_exif_orientation_is_honoured(tmp_path, orientation, row, column):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(corner()).save(tmp_path / "a.png", exif=exif)
    frame, info = read_clip(tmp_path / "a.png")[0], probe(tmp_path / "a.png")
    size = (20, 30) if orientation < 5 else (30, 20)
    assert frame.shape[:2] == size == (info.height, info.width)
    lit = {(y, x): bool(frame[y, x, 0] == 255) for y in (0, -1) for x in (0, -1)}
    assert lit == {place: place == (row, column) for place in lit}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (60, 60, 60, 255)
    image = Image.fromarray(pixels).convert(mode)
    if mode == "P":
        image = Image.fromarray((pixels[..., 3] // 255).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 60, 60, 60])
        image.save(tmp_path / "a.png", transparency=0)
    else:
        image.save(tmp_path / "a.png")
    frame = read_clip(tmp_path / "a.png")[0]
    assert frame[4, 1].tolist() == [255] * 3 and frame[4, 6].tolist() == [60] * 3


def test_half_transparent(tmp_path):
    Image.fromarray(np.full((4, 4, 4), (0, 100, 200, 128), np.uint8)).save(tmp_path / "a.png")
    assert abs(read_clip(tmp_path / "a.png")[0, 0, 0].astype(int) - [127, 177, 227]).max() <= 1


@pytest.mark.parametrize(("depth", "value"), [(np.uint16, 0xC8FF), (np.uint8, 0xC8)])
def test_grey_of_any_depth(tmp_path, depth, value):
    Image.fromarray(np.full((4, 4), value, depth)).save(tmp_path / "a.png")
    assert read_clip(tmp_path / "a.png")[0, 2, 2].tolist() == [0xC8] * 3


def test_size_is_covered_and_cropped(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = read_clip(tmp_path / "a.png", height=20, width=20)[0]
    assert frame.shape == (20, 20, 3) and frame[:, 2:-2].min() == 255
    left = read_clip(tmp_path / "a.png", height=20, width=20, crop_at=(0.5, 0.0))[0]
    assert left[10, 2, 0] == 0 and left[10, 17, 0] == 255


def test_an_image_is_not_several_frames(tmp_path):
    Image.fromarray(corner()).save(tmp_path / "a.png")
    with pytest.raises(BrokenClip, match="an image is one frame, 3 are wanted"):
        read_clip(tmp_path / "a.png", num_frames=3, fps=8)


@pytest.mark.parametrize("keep", [0, 20, 200])
def test_damaged_images(tmp_path, keep):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenClip, match=r"a\.png: cannot be (opened|decoded) as an image"):
        read_clip(path)


@pytest.mark.parametrize(("value", "shown"), [(0.5, 128), (1.0, 255), (200.4, 200), (300.0, 255)])
def test_floating_point_numbers_up_to_one_or_up_to_255(tmp_path, value, shown):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tiff")
    assert read_clip(tmp_path / "a.tiff")[0, 2, 2].tolist() == [shown] * 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_named(tmp_path, value):
    pixels = np.full((4, 6), 0.5, np.float32)
    pixels[2, 5] = value
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    with pytest.raises(BrokenClip, match="not finite, the first in row 2, column 5"):
        read_clip(tmp_path / "a.tiff")
