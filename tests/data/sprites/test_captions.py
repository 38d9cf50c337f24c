"""Captions say what is true, and nothing else."""

import json
import re

from vidgen.data.sprites.attributes import BACKGROUND_COLOURS, COLOURS, Motion, Shape, Size
from vidgen.data.sprites.captions import CAMERAS, MOTIONS, canonical
from vidgen.data.sprites.source import SpritesData


def words(caption: str, vocabulary) -> list[str]:
    return [w for w in re.findall(r"[a-z]+", caption) if w in vocabulary]


def test_caption_states_the_attributes():
    source = SpritesData(num_clips=200).source()
    omitted = 0
    for index in range(120):
        clip = source[index]
        caption, truth = clip["caption"], json.loads(clip["attributes"])
        objects = truth["objects"]
        background = truth["background"]
        assert words(caption, COLOURS) == [o["colour"] for o in objects]
        assert words(caption, list(Shape)) == [o["shape"] for o in objects]
        stated = [c for c in (background["colour"], background["colour_below"]) if c]
        assert words(caption, BACKGROUND_COLOURS) == stated
        for o in objects:
            assert any(phrase in caption for phrase in MOTIONS[Motion(o["motion"])])
        assert ("camera" in caption) == (truth["camera"] != "static")
        if truth["camera"] != "static":
            assert any(caption.endswith(phrase) for phrase in CAMERAS[truth["camera"]])
        sizes = words(caption, list(Size))
        iterator = iter(o["size"] for o in objects)
        assert all(s in iterator for s in sizes)
        omitted += len(objects) - len(sizes)
    assert 0 < omitted < 120


def test_paraphrases_vary():
    source = SpritesData(max_objects=1, motions=("left",), backgrounds=("plain",)).source()
    captions = [source[k]["caption"] for k in range(60)]
    phrases = {p for c in captions for p in MOTIONS[Motion.LEFT] if p in c}
    assert phrases == set(MOTIONS[Motion.LEFT])


def test_phrases_belong_to_one_motion():
    phrases = [phrase for options in MOTIONS.values() for phrase in options]
    assert len(phrases) == len(set(phrases))


def test_canonical_is_complete_and_fixed():
    source = SpritesData(max_objects=3).source()
    for index in range(50):
        scene = source.scene(index)
        prompt = canonical(scene)
        assert prompt == canonical(scene)
        assert words(prompt, list(Size)) == [str(o.size) for o in scene.objects]
        assert all(MOTIONS[o.motion][0] in prompt for o in scene.objects)


def test_images_have_no_motion_in_the_caption():
    source = SpritesData(num_frames=1).source()
    for index in range(60):
        caption = source[index]["caption"]
        assert not any(f" {phrase}" in caption for options in MOTIONS.values() for phrase in options)
        assert "camera" not in caption
