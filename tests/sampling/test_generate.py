"""From prompts to pixels with random weights: nothing that a result depends on is zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.diffusion.shift import RootShift
from vidgen.models.condition import Condition
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text.tokenizer import PromptTooLong, tokenize
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import constrain, shardings
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.generate import _advance, denoise, denoise_on_device, generate
from vidgen.sampling.guidance import AdaptiveProjected, ZeroStar
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.sampler import initial_noise, sample
from vidgen.sampling.steppers import Euler
from vidgen.sampling.time_grid import TimeGrid

SIZE = (3, 8, 8)
OPTIONS = SamplingOptions(grid=TimeGrid(num_steps=3), guidance_scale=3.0)
PROMPTS = [f"{n} dogs" for n in range(8)]


@pytest.fixture(scope="module")
def model():
    dit = DiTConfig(
        in_channels=4, model_dim=32, num_layers=2, num_heads=2, ffn_dim=32, text_dim=16, freq_dim=8
    )
    text = ByteEncoderConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=16, max_bytes=8)
    return random_module(lambda: TextToVideo(DiT(dit, rngs=nnx.Rngs(0)), ByteEncoder(text, rngs=nnx.Rngs(1))))


@pytest.fixture(scope="module")
def vae():
    config = VAEConfig(
        base_dim=4, latent_channels=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
    )
    return random_module(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def run(model, vae):
    return functools.partial(generate, model, vae, size=SIZE, options=OPTIONS)


@pytest.fixture(scope="module")
def eight(run):
    """Eight videos, without a mesh."""
    return run(PROMPTS, seeds=range(8))


def assert_equal_pixels(video, expected):
    """But for rounding that went the other way: sums of another order differ in the last bits."""
    difference = np.abs(video.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_videos_have_the_size_asked_for(eight):
    assert eight.shape == (8, *SIZE, 3) and eight.dtype == np.uint8
    assert eight.std() > 10 and (eight % 255 > 0).mean() > 0.1, "not black, white or grey"


def test_the_same_seeds_give_the_same_videos(run, eight):
    np.testing.assert_array_equal(run(PROMPTS, seeds=range(8)), eight)


def test_a_video_depends_on_its_prompt_and_seed_alone(run, eight):
    alone = run(PROMPTS[5:6], seeds=[5])
    assert_equal_pixels(alone[0], eight[5])
    changed = run([*PROMPTS[:6], "a cat", PROMPTS[7]], seeds=[0, 1, 2, 3, 4, 5, 6, 70])
    assert_equal_pixels(changed[:6], eight[:6])
    for other in (6, 7):
        assert np.abs(changed[other].astype(int) - eight[other]).mean() > 1


@pytest.mark.parametrize(
    "options", [MeshOptions(), MeshOptions(data=2, fsdp=2, tensor=2)], ids=["data", "data, fsdp, tensor"]
)
def test_videos_do_not_depend_on_the_number_of_devices(model, vae, eight, options):
    mesh = options.build()
    place = lambda module: jax.device_put(module, shardings(module, mesh))  # noqa: E731
    with jax.set_mesh(mesh):
        videos = generate(place(model), place(vae), PROMPTS, size=SIZE, seeds=range(8), options=OPTIONS)
    assert_equal_pixels(videos, eight)


def test_latents_do_not_depend_on_the_number_of_devices(model):
    tokens, mask = map(jnp.asarray, tokenize(PROMPTS, 8))

    @jax.jit
    def run(model, seeds):
        noise = constrain(initial_noise(seeds, (2, 4, 4, 4)), "batch", None, None, None, None)
        network = functools.partial(model.velocity, condition=model.condition(tokens, mask))
        return noise, sample(network, noise, grid=TimeGrid(num_steps=3), stepper=Euler())

    seeds = jnp.arange(8, dtype=jnp.uint32)
    made = {}
    for count in (1, 8):
        mesh = MeshOptions().build(jax.devices()[:count])
        with jax.set_mesh(mesh):
            noise, latents = run(jax.device_put(model, shardings(model, mesh)), np.asarray(seeds))
            assert len(latents.sharding.device_set) == count
            assert count == 1 or not latents.sharding.is_fully_replicated
            made[count] = np.asarray(noise), np.asarray(latents)
    np.testing.assert_array_equal(made[8][0], made[1][0])
    assert np.abs(made[1][1] - made[1][0]).mean() > 0.1
    np.testing.assert_allclose(made[8][1], made[1][1], rtol=1e-4, atol=1e-5)


def test_guidance_leads_away_from_the_negative_prompt(model, vae, run):
    plain, away = (run(["a dog"], seeds=[0], negative_prompt=text) for text in ("", "a cat"))
    assert np.abs(plain.astype(int) - away).mean() > 1
    # Without guidance there is none.
    off = SamplingOptions(grid=TimeGrid(num_steps=3), guidance_scale=1.0)
    conditional = [
        generate(model, vae, ["a dog"], size=SIZE, seeds=[0], options=off, negative_prompt=text)
        for text in ("", "a cat")
    ]
    np.testing.assert_array_equal(*conditional)
    assert np.abs(plain.astype(int) - conditional[0]).mean() > 1


def test_other_guidance_and_where_it_is(model, vae, run):
    """Each does something; in no step, it is the model under its prompt."""
    made = lambda **changes: generate(  # noqa: E731
        model, vae, ["a dog"], size=SIZE, seeds=[0], options=dataclasses.replace(OPTIONS, **changes)
    ).astype(int)
    plain, alone = made(), made(guidance_scale=1.0)
    for other in (
        {"guidance": ZeroStar()},
        {"guidance": AdaptiveProjected(norm_threshold=1.0)},
        {"guidance_interval": (0.2, 0.8)},
        {"grid": TimeGrid(num_steps=3, shift=RootShift(base_tokens=2))},
    ):
        assert min(np.abs(made(**other) - x).mean() for x in (plain, alone)) > 0.5
    np.testing.assert_array_equal(made(guidance_interval=(0.1, 0.2)), alone)
    with pytest.raises(ValueError, match=r"guidance_interval=\(0\.5, 0\.5\): expected 0 <= low < high <= 1"):
        SamplingOptions(guidance_interval=(0.5, 0.5))


def test_a_cache_that_computes_every_step_changes_nothing(model, vae):
    made = lambda **changes: generate(  # noqa: E731
        model, vae, ["a dog"], size=SIZE, seeds=[0], options=dataclasses.replace(OPTIONS, **changes)
    )
    np.testing.assert_array_equal(made(cache=TeaCache(threshold=0.0)), made())
    # First, where guidance begins, last: all three of these steps.
    late = {"guidance_interval": (0.0, 0.8)}
    np.testing.assert_array_equal(made(cache=TeaCache(threshold=1e9), **late), made(**late))
    assert np.abs(made(cache=TeaCache(threshold=1e9)).astype(int) - made()).mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1]}, "found 2 prompts and 1 seeds"),
        ({"prompts": [], "seeds": []}, "found 0 prompts and 0 seeds"),
        ({"seeds": [-1, 0]}, r"seed: found -1, expected a whole number from 0 to 4,294,967,295"),
        ({"seeds": [0, 2**32]}, r"seed: found 4294967296, expected"),
        ({"size": (4, 8, 8)}, r"num_frames=4 is not 1 \+ 2 n; use 3 or 5"),
        ({"size": (3, 7, 8)}, "height=7 is not a multiple of 4; use 4 or 8"),
        ({"size": (3, 2, 8)}, "height=2 is not a multiple of 4; use 4$"),
        ({"size": (3, 8, 10)}, "width=10 is not a multiple of 4; use 8 or 12"),
        ({"prompts": ["a dog", "nine byte"]}, "the prompt has 9 bytes, the text encoder takes 8"),
        ({"negative_prompt": "nine byte"}, "the prompt has 9 bytes, the text encoder takes 8"),
    ],
)
def test_errors(model, vae, arguments, message):
    defaults = {"prompts": ["a dog", "a cat"], "seeds": [0, 1], "size": SIZE}
    call = defaults | arguments
    kind = PromptTooLong if "bytes" in message else ValueError
    with pytest.raises(kind, match=message):
        generate(model, vae, call.pop("prompts"), **call)


def test_any_number_of_steps_and_any_scale_is_one_program(model, vae, run):
    run(["a dog"], seeds=[0])
    programs = _advance._cache_size()
    for other in (
        {"grid": TimeGrid(num_steps=2)},
        {"grid": TimeGrid(num_steps=5, shift=3.0, convention="unipc")},
        {"guidance_scale": 7.5},
    ):
        options = dataclasses.replace(OPTIONS, **other)
        generate(model, vae, ["a dog"], size=SIZE, seeds=[0], options=options)
    assert _advance._cache_size() == programs


def test_progress_and_one_program_of_all_steps(model, vae):
    tokens, mask = map(jnp.asarray, tokenize(["a dog", ""], 8))
    both = model.condition(tokens, mask)
    positive, negative = (jax.tree.map(lambda x, i=i: x[i : i + 1], both) for i in (0, 1))
    noise = initial_noise(jnp.asarray([3], jnp.uint32), (2, 4, 4, 4))
    seen = []
    video = denoise(model, vae, noise, positive, negative, options=OPTIONS, on_progress=seen.append)
    assert seen == [("step", 0, 3), ("step", 1, 3), ("step", 2, 3), ("decoding", 3, 3)]
    run = jax.jit(lambda *arrays: denoise_on_device(*arrays, options=OPTIONS))
    assert_equal_pixels(run(model, vae, noise, positive, negative), video)


def test_the_network_says_nothing_where_latents_are_given(model):
    """However it is asked: with guidance, whose norms take in all latents, and without."""
    random = np.random.default_rng(0)
    latents, given = (jnp.asarray(random.normal(size=(2, 3, 4, 4, 4)), jnp.float32) for _ in range(2))
    known_mask = jnp.zeros((2, 3, 4, 4), bool).at[:, 0].set(True)
    text = jnp.asarray(random.normal(size=(2, 8, 16)), jnp.float32)
    condition = Condition(text, known_latents=given, known_mask=known_mask)
    velocity = model.velocity(latents, jnp.asarray([0.3, 0.9]), condition)
    assert (velocity[:, 0] == 0).all() and (velocity[:, 1:] != 0).all()
