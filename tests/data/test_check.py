import pytest
from PIL import Image

from vidgen.data.check import find_damage
from vidgen.data.video_reader import probe


@pytest.fixture
def damaged(numbered_video, tmp_path):
    """A video of four seconds whose second quarter is overwritten."""
    path = numbered_video("a.mp4", 100, options={"g": "10"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 4
    data[start : start + 300] = bytes(300)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_sound_files_have_no_damage(numbered_video, name, full):
    path = numbered_video(name, 40)
    assert find_damage(path, probe(path), full=full) is None


def test_damage_inside_is_found_by_decoding_everything(damaged):
    assert find_damage(damaged, probe(damaged), full=False) is None
    assert "d" in (find_damage(damaged, probe(damaged), full=True) or "")


@pytest.mark.parametrize("full", [False, True])
def test_a_file_cut_off_is_found(numbered_video, full):
    path = numbered_video("a.mkv", 100, options={"g": "10"})
    data = path.read_bytes()
    info = probe(path)
    path.write_bytes(data[: len(data) // 2])
    assert find_damage(path, info, full=full)


def test_images(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    info = probe(path)
    assert find_damage(path, info, full=False) is None
    path.write_bytes(path.read_bytes()[:500])
    assert "cannot be decoded as an image" in (find_damage(path, info, full=False) or "")
