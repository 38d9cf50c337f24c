import logging

import numpy as np

from vidgen.models.text.config import ByteEncoderConfig
from vidgen.train.text_to_video_task import TextToVideoTask


def test_captions_that_are_cut_are_named_once(caplog):
    task = TextToVideoTask(vae="unused", text=ByteEncoderConfig(max_bytes=8))
    video = np.zeros((2, 1, 8, 8, 3), np.uint8)

    def batch(*names):
        return {
            "video": video[: len(names)],
            "caption": ["é" * 5, "short"][: len(names)],
            "name": list(names),
        }

    with caplog.at_level(logging.WARNING):
        task.arrays({**batch("a", "b"), "caption": ["12345678", "éééé"]})
        assert not caplog.records
        task.arrays(batch("a.mp4", "b.mp4"))
        for number in range(8):
            task.arrays(batch(f"{number}.mp4"))
            task.arrays(batch("a.mp4"))
        assert "1 captions so far are cut at task.text.max_bytes=8" in caplog.text
        assert "a.mp4 (10 bytes)" in caplog.text and len(caplog.records) == 1
        task.arrays(batch("9.mp4"))
    assert len(caplog.records) == 2 and "10 captions so far" in caplog.text


def test_captions_of_packed_clips(caplog):
    from vidgen.train.long_captions import LongCaptions

    clips = [{"caption": "long caption", "name": "x"}, {"caption": "", "name": "y"}]
    LongCaptions(4).note({"rows": [clips[1:], clips[:1]]})
    assert "x (12 bytes)" in caplog.text
