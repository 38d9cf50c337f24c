"""Video files in and out: what the rest of the code imports."""

from vidgen.data.video_writer import read_metadata, save_video

__all__ = ["read_metadata", "save_video"]
