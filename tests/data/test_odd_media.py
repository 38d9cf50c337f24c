"""Files that players show and that are easily taken for damaged, or the other way round."""

import inspect
import os
import shutil
import types

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from vidgen.data import video_file
from vidgen.data.check import find_damage
from vidgen.data.folder_files import FolderFiles
from vidgen.data.source import BrokenClip
from vidgen.data.video_reader import probe, read_clip


def remux(source, target, change=lambda number, packet: None):
    """Copies the packets of a video into another container, each changed on the way."""
    with av.open(str(source)) as container, av.open(str(target), "w") as output:
        stream = output.add_stream_from_template(container.streams.video[0])
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
        for number, packet in enumerate(packets):
            change(number, packet)
            packet.stream = stream
            output.mux(packet)
    return target


def numbers(path, number_of, **keywords):
    return [number_of(frame) for frame in read_clip(path, **keywords)]


def every_start(path, number_of, count, fps=25):
    return [numbers(path, number_of, start=index / fps, num_frames=1, fps=fps)[0] for index in range(count)]


def check(path):
    return [find_damage(path, probe(path), full=full) for full in (False, True)]


def reason(path):
    """Why a scan and a reading of the file refuse it; the two agree."""
    with pytest.raises(BrokenClip) as found:
        probe(path)
    with pytest.raises(BrokenClip):
        read_clip(path)
    return found.value.reason


@pytest.fixture
def edited(numbered_video, tmp_path):
    """A clip cut with stream copy: the first 4 of its 20 frames are in the file, and hidden."""
    source = numbered_video("source.mp4", 20, options={"bf": "3", "g": "60"})

    def earlier(_, packet):
        hidden = round(0.16 / packet.time_base)
        packet.pts, packet.dts = packet.pts - hidden, packet.dts - hidden

    return remux(source, tmp_path / "edited.mp4", earlier)


def test_an_edit_list_hides_frames(edited, number_of):
    assert numbers(edited, number_of) == list(range(4, 20))
    assert (probe(edited).num_frames, probe(edited).duration) == (16, pytest.approx(0.64))
    assert every_start(edited, number_of, 16) == list(range(4, 20))
    assert check(edited) == [None, None]


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_streams_with_one_key_frame(numbered_video, number_of, name):
    codec = "mpeg2video" if name == "a.mpg" else "libx264"
    path = numbered_video(name, 30, codec=codec, options={"g": "250", "bf": "2"})
    assert every_start(path, number_of, 30) == list(range(30))
    assert (probe(path).duration, probe(path).fps) == (pytest.approx(1.2), 25)
    assert check(path) == [None, None]


def test_key_frames_that_are_no_clean_entry_points(numbered_video, tmp_path, number_of):
    def mark(number, packet):
        packet.is_keyframe = number % 15 == 0

    source = numbered_video("source.mp4", 45, codec="mpeg4", options={"g": "250"})
    path = remux(source, tmp_path / "marked.mp4", mark)
    assert every_start(path, number_of, 45) == list(range(45))
    assert check(path) == [None, None]


def test_times_that_begin_anew_are_refused(numbered_video, tmp_path):
    part = numbered_video("part.ts", 20).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(part + part)
    assert "joined end to end" in reason(path)


def test_frames_that_a_decoder_leaves_out_are_named(numbered_video, monkeypatch):
    path = numbered_video(
        "a.mp4", 30, codec="libx265", options={"bframes": "3", "x265-params": "log-level=none"}
    )
    assert check(path) == [None, None]
    info, opened = probe(path), video_file.VideoFile._open

    def lossy(self):
        opened(self)
        self._stream.codec_context.skip_frame = "NONREF"

    monkeypatch.setattr(video_file.VideoFile, "_open", lossy)
    with pytest.raises(BrokenClip, match="are not decoded"):
        read_clip(path)
    assert "are not decoded" in (find_damage(path, info, full=True) or "")


def test_the_rate_of_a_clock_is_not_that_of_the_frames(numbered_video, monkeypatch):
    path = numbered_video("a.mkv", 20)
    monkeypatch.setattr(video_file, "_FAST", 24)
    assert (probe(path).fps, probe(path).num_frames) == (pytest.approx(25), 20)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile '{}'\n"),
        (
            "list.sdp",
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        ),
    ],
)
def test_playlists_are_no_clips(numbered_video, tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content.format(numbered_video("a.ts", 10)))
    assert "playlists and manifests are no clips" in reason(path)


def test_raw_streams_have_no_times(numbered_video):
    assert "no times of frames" in reason(numbered_video("a.h264", 10))


def test_pictures_of_tiles_are_refused(numbered_video, monkeypatch):
    path = numbered_video("a.mp4", 2)
    names = types.SimpleNamespace(
        attached_pic=Disposition.attached_pic, default=Disposition.default, dependent=Disposition.default
    )
    monkeypatch.setattr(video_file, "Disposition", names)
    assert "tiles" in reason(path)


def test_whatever_a_decoder_raises_is_the_reason_of_that_file(numbered_video, tmp_path, monkeypatch):
    avif = tmp_path / "a.avif"
    Image.new("RGB", (16, 16)).save(avif)
    avif.write_bytes(avif.read_bytes().replace(b"pitm", b"free"))
    assert "cannot be opened as an image" in reason(avif)  # a RuntimeError of Pillow
    path = numbered_video("a.mp4", 3)
    for error in (RuntimeError("odd"), ValueError("odd"), MemoryError(), KeyError("odd")):
        monkeypatch.setattr(video_file.VideoFile, "_pick_stream", lambda _, error=error: raises(error))
        assert "cannot be opened as video" in reason(path)


def raises(error):
    raise error


def test_side_data_that_pyav_does_not_know():
    class Frame:
        rotation = -90

        @property
        def side_data(self):
            raise ValueError("29 is not a valid Type")

    assert inspect.unwrap(video_file.orientation)(Frame()).quarter_turns == 1


def test_pictures_run_no_program(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    assert "cannot" in reason(path)


@pytest.mark.parametrize(
    "name", ["2024-01-01T12:30:00.mp4", "-dash.mp4", "50% #1 %03d.mp4", "日本 🎬.mp4", "data:,x.mp4"]
)
def test_names_are_names_of_files(numbered_video, tmp_path, monkeypatch, name):
    shutil.copy(numbered_video("a.mp4", 5), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert probe(name).num_frames == 5
    assert len(read_clip(name)) == 5


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere", tmp_path / "gone.mp4")
    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"x")
    found = {file.name: file.info for file in FolderFiles.look(tmp_path, None).found}
    assert found == {
        "pipe.mp4": "not a regular file",
        "pipe.png": "not a regular file",
        "gone.mp4": "a link to a file that is not there",
        "\\xff.mp4": "its name is not UTF-8: rename it",
    }


def test_pictures_too_large_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    path = tmp_path / "bomb.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    assert "decompression bomb" in reason(path)
