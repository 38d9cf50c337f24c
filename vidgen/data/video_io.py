"""Public functions that read and write video files."""

from vidgen.data.video_file import VideoInfo
from vidgen.data.video_reader import probe, read_clip, read_frames
from vidgen.data.video_writer import read_metadata, save_frames, save_video

__all__ = ["VideoInfo", "probe", "read_clip", "read_frames", "read_metadata", "save_frames", "save_video"]
