"""Which clips are encoded, and that how many are encoded at a time does not matter."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.data.buckets import Bucket
from vidgen.data.source import BrokenClip
from vidgen.data.sprites.source import SpritesData
from vidgen.models.video_vae.config import VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.encode_clips import choose_clips, encode_clips

BUCKETS = (
    Bucket(num_frames=1, height=16, width=16, weight=1.0, batch_size=4),
    Bucket(num_frames=5, height=16, width=16, weight=2.0),
    Bucket(num_frames=5, height=16, width=8, weight=0.25),
)
DATA = SpritesData(num_clips=20, height=16, width=16, num_frames=5, buckets=BUCKETS)


class Breaking:
    """Another source, two of whose clips are broken."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in (0, 3):
            raise BrokenClip(f"clip {index}", "no picture")
        return self.source[index]


def test_without_a_number_every_clip_of_every_size_is_taken():
    chosen = choose_clips(DATA, None)
    assert [size.num_frames for size, *_ in chosen] == [1, 5, 5]
    assert all(indices.tolist() == list(range(20)) for *_, indices in chosen)
    alone = choose_clips(SpritesData(num_clips=3, height=16, width=24, num_frames=9), None)
    assert len(alone) == 1 and str(alone[0][0]) == "9 x 16 x 24" and len(alone[0][2]) == 3


def test_a_number_is_shared_as_the_clips_of_steps_are():
    chosen = choose_clips(DATA, 25)
    assert [len(indices) for *_, indices in chosen] == [16, 8, 1]
    for *_, indices in chosen:
        assert len(set(indices.tolist())) == len(indices) and sorted(indices) == list(indices)
    again = choose_clips(DATA, 25)
    assert [c[2].tolist() for c in chosen] == [c[2].tolist() for c in again]
    assert choose_clips(DATA, 25)[0][2].tolist() != list(range(16))


@pytest.mark.parametrize(("count", "more"), [(4, "more"), (40, "fewer")])
def test_a_share_that_a_bucket_does_not_have_is_an_error(count, more):
    with pytest.raises(ValueError, match=rf"{count} clips are \d+ of the size .*: take {more}, or change"):
        choose_clips(DATA, count)


def test_latents_do_not_depend_on_the_batch_and_broken_clips_are_named():
    vae = random_module(lambda: VideoVAE(VARIANTS["tiny"], rngs=nnx.Rngs(0)))
    size, source, _ = choose_clips(DATA, None)[1]
    chosen = [(size, Breaking(source), np.arange(11))]
    found = {}
    for devices in (8, 1):
        broken: dict[str, str] = {}
        mesh = MeshOptions().build(jax.devices()[:devices])
        found[devices] = list(encode_clips(vae, chosen, batch_size=5, mesh=mesh, broken=broken))
        assert broken == {"clip 0": "no picture", "clip 3": "no picture"}
    for eight, one, index in zip(found[8], found[1], (1, 2, 4, 5, 6, 7, 8, 9, 10), strict=True):
        assert eight.name == one.name == source[index]["name"] and eight.caption == source[index]["caption"]
        assert (one.num_frames, one.height, one.width) == (5, 16, 16)
        assert eight.latents.shape == VARIANTS["tiny"].latent_shape(5, 16, 16)
        np.testing.assert_allclose(eight.latents, one.latents, atol=1e-5)
