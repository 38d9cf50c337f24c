"""From prompts to pixels with random weights: nothing that a result depends on is zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.dit.call import velocity
from tests.sampling.tiny_pipeline import LATENTS, OPTIONS, SIZE, make_model, make_pipeline, make_vae
from vidgen.core.streams import TEXT
from vidgen.diffusion.shift import RootShift
from vidgen.models.byte_prompts import BytePrompts
from vidgen.models.text.tokenizer import PromptTooLong, tokenize
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import constrain, shardings
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.conditioning import Condition
from vidgen.sampling.guidance import AdaptiveProjected, ZeroStar
from vidgen.sampling.programs import _step, denoise_on_device, seeded_noise
from vidgen.sampling.sampler import initial_noise, sample
from vidgen.sampling.steppers import Euler
from vidgen.sampling.time_grid import TimeGrid

PROMPTS = [f"{n} dogs" for n in range(8)]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def pipe(model, vae):
    return make_pipeline(model, vae)


@pytest.fixture(scope="module")
def made(model, vae):
    """A video of one prompt, with other default options."""

    def call(negative_prompt="", **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        return make_pipeline(model, vae, options=options)("a dog", negative_prompt=negative_prompt).astype(
            int
        )

    return call


@pytest.fixture(scope="module")
def eight(pipe):
    """Eight videos, on one device."""
    return pipe(PROMPTS)


def assert_equal_pixels(video, expected):
    """But for rounding that went the other way: sums of another order differ in the last bits."""
    difference = np.abs(video.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_videos_have_the_size_asked_for(eight):
    assert eight.shape == (8, *SIZE, 3) and eight.dtype == np.uint8
    assert eight.std() > 10 and (eight % 255 > 0).mean() > 0.1, "not black, white or grey"


def test_the_same_seeds_give_the_same_videos(pipe, eight):
    np.testing.assert_array_equal(pipe(PROMPTS), eight)


def test_a_video_depends_on_its_prompt_and_noise_alone(pipe, eight):
    assert_equal_pixels(pipe(PROMPTS[5], seed=5), eight[5])
    noise = np.asarray(seeded_noise([*range(7), 70], LATENTS))
    changed = pipe([*PROMPTS[:6], "a cat", PROMPTS[7]], noise=noise)
    assert_equal_pixels(changed[:6], eight[:6])
    for other in (6, 7):
        assert np.abs(changed[other].astype(int) - eight[other]).mean() > 1


@pytest.mark.parametrize(
    "options", [MeshOptions(), MeshOptions(data=2, fsdp=2, tensor=2)], ids=["data", "data, fsdp, tensor"]
)
def test_videos_do_not_depend_on_the_number_of_devices(model, vae, eight, options):
    mesh = options.build()
    place = lambda module: jax.device_put(module, shardings(module, mesh))  # noqa: E731
    assert_equal_pixels(make_pipeline(place(model), place(vae), mesh=mesh)(PROMPTS), eight)


def test_latents_do_not_depend_on_the_number_of_devices(model):
    tokens, mask = map(jnp.asarray, tokenize(PROMPTS, 8))

    @jax.jit
    def run(model, seeds):
        noise = constrain(initial_noise(seeds, LATENTS), "batch", None, None, None, None)
        text = model.encode_text(tokens, mask)
        network = lambda x, t: velocity(model.dit, x, t, text.features, text.mask)  # noqa: E731
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


def test_guidance_leads_away_from_the_negative_prompt(made):
    plain, away = made(), made("a cat")
    assert np.abs(plain - away).mean() > 1
    # Without guidance there is none.
    conditional = [made(text, guidance_scale=1.0) for text in ("", "a cat")]
    np.testing.assert_array_equal(*conditional)
    assert np.abs(plain - conditional[0]).mean() > 1


def test_other_guidance_and_where_it_is(made):
    """Each does something; in no step, it is the model under its prompt."""
    plain, alone = made(), made(guidance_scale=1.0)
    for other in (
        {"guidance": ZeroStar()},
        {"guidance": AdaptiveProjected(norm_threshold=1.0)},
        {"guidance_interval": (0.2, 0.8)},
        {"grid": TimeGrid(num_steps=3, shift=RootShift(base_tokens=2))},
    ):
        assert min(np.abs(made(**other) - x).mean() for x in (plain, alone)) > 0.5
    np.testing.assert_array_equal(made(guidance_interval=(0.1, 0.2)), alone)


def test_a_cache_that_computes_every_step_changes_nothing(made):
    np.testing.assert_array_equal(made(cache=TeaCache(threshold=0.0)), made())
    # First, where guidance begins, last: all three of these steps.
    late = {"guidance_interval": (0.0, 0.8)}
    np.testing.assert_array_equal(made(cache=TeaCache(threshold=1e9), **late), made(**late))
    assert np.abs(made(cache=TeaCache(threshold=1e9)) - made()).mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "found no prompt: give at least one"),
        ({"seed": -1}, r"seed: found -1, expected a whole number from 0 to 4,294,967,295"),
        ({"prompt": ["a", "b"], "seed": 2**32 - 1}, r"seed: found 4294967296, expected"),
        ({"num_frames": 4}, r"num_frames=4 is not 1 \+ 2 n; use 3 or 5"),
        ({"height": 7}, "height=7 is not a multiple of 4; use 4 or 8"),
        ({"height": 2}, "height=2 is not a multiple of 4; use 4$"),
        ({"width": 10}, "width=10 is not a multiple of 4; use 8 or 12"),
        ({"prompt": ["a dog", "nine byte"]}, "the prompt has 9 bytes, the text encoder takes 8"),
        ({"negative_prompt": "nine byte"}, "the prompt has 9 bytes, the text encoder takes 8"),
        (
            {"guidance_interval": (0.5, 0.5)},
            r"guidance_interval=\(0\.5, 0\.5\): expected 0 <= low < high <= 1",
        ),
        ({"guidance_scale_2": 2.0}, "guidance_scale_2 is for models with two transformers; leave it out"),
    ],
)
def test_errors(pipe, arguments, message):
    kind = PromptTooLong if "bytes" in message else ValueError
    with pytest.raises(kind, match=message):
        pipe(**({"prompt": "a dog"} | arguments))


def test_any_number_of_steps_and_any_scale_is_one_program(made):
    made()
    programs = _step._cache_size()
    made(grid=TimeGrid(num_steps=2))
    made(grid=TimeGrid(num_steps=5, shift=3.0, convention="unipc"))
    made(guidance_scale=7.5)
    assert _step._cache_size() == programs


def test_one_program_of_all_steps(model, vae, made):
    encode = BytePrompts(model)
    condition = Condition({TEXT: encode(["a dog"])}, negative={TEXT: encode([""])})
    noise = initial_noise(jnp.asarray([0], jnp.uint32), LATENTS)
    run = jax.jit(lambda *arrays: denoise_on_device(*arrays, options=OPTIONS))
    assert_equal_pixels(run(model.dit, vae, noise, condition)[0], made())
