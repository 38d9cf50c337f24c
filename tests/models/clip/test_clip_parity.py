"""The same weights in transformers' CLIP image encoder give the same features."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.core.tree import count, named_leaves
from vidgen.models.clip.config import VARIANTS
from vidgen.models.clip.images import prepare
from vidgen.models.clip.model import CLIPVision
from vidgen.models.clip.params import transformers_names
from vidgen.models.clip.transformers_folder import load_transformers, read_config

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**SMALL, hidden_act=request.param)
    reference = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    return reference, load_transformers(folder), folder


def test_features_of_every_depth(pair):
    reference, encoder, _ = pair
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        states = reference(
            torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True
        ).hidden_states
    assert len(states) == 4
    for skip, expected in enumerate(reversed(states)):
        found = jax.jit(lambda encoder, x, skip=skip: encoder(x, skip=skip))(encoder, images)
        assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.std()


def test_names_of_older_versions_and_what_stands_beside(pair, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, encoder, folder = pair
    tensors = {f"vision_model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    tensors["visual_projection.weight"] = np.zeros((8, 24), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_transformers(tmp_path)), nnx.state(encoder))


@pytest.mark.parametrize("shape", [(300, 240), (120, 500), (224, 224), (90, 91)])
def test_images_are_prepared_as_there(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = np.repeat(np.repeat(image[::8, ::8], 8, 0), 8, 1)[: shape[0], : shape[1]]
    processor = transformers.CLIPImageProcessor()
    expected = processor(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    found = prepare(image)
    assert found.shape == expected.shape
    # Pixels are rounded to 8 bits after resizing, here and there; where they part, it is by one step.
    assert np.abs(found - expected).max() <= 1.01 / 255 / 0.26


def test_other_models_and_sizes_are_refused(pair, tmp_path):
    _, encoder, folder = pair
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: give the folder of a CLIP"):
        load_transformers(tmp_path)
    for change, message in (
        ({"model_type": "clip"}, "model_type='clip'; expected 'clip_vision_model'"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
    with pytest.raises(ValueError, match="images are 28 x 35; the encoder takes 28 x 28"):
        encoder(jnp.zeros((1, 28, 35, 3)))


def test_names_of_vit_h_14():
    config = VARIANTS["vit-h-14"]
    encoder = nnx.eval_shape(lambda: CLIPVision(config, rngs=nnx.Rngs(0)))
    leaves = named_leaves(nnx.state(encoder, graph=False))
    shapes = {}
    for name, mapping in transformers_names(config, leaves).items():
        shapes |= mapping.external_shapes(tuple(leaves[name].shape))
    with torch.device("meta"):
        reference = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
                hidden_act="gelu",
            )
        )
    expected = {
        name.removeprefix("vision_model."): tuple(x.shape) for name, x in reference.named_parameters()
    }
    assert shapes == expected
    assert count(leaves) == 630_766_080 and config.num_tokens == 257
