"""The same weights in transformers' T5 and UMT5 encoders give the same features."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from vidgen.ckpt.weights import WeightsError
from vidgen.core.tree import named_leaves
from vidgen.models.t5.config import VARIANTS
from vidgen.models.t5.model import T5Encoder, relative_buckets
from vidgen.models.t5.params import transformers_names, wan_names
from vidgen.models.t5.transformers_folder import load_transformers, read_config
from vidgen.parallel.mesh import MeshOptions

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

SMALL = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


@pytest.fixture(scope="module", params=["T5", "UMT5"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SMALL)
    reference = getattr(transformers, f"{request.param}EncoderModel")(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            scale = 1.0 if parameter.ndim == 1 or "relative" in name else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    reference.save_pretrained(folder)
    return reference, load_transformers(folder), folder


def test_features(pair):
    reference, encoder, _ = pair
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 40)).astype(np.int32)
    mask = np.arange(40)[None] < np.array([[40], [23]])
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    found = np.asarray(jax.jit(lambda encoder, *x: encoder(*x))(encoder, tokens, mask))
    error = np.abs(found - expected)[mask]
    assert error.max() <= 1e-5 * expected[mask].std()


def test_several_files_are_laid_over_a_mesh(pair, tmp_path):
    reference, encoder, _ = pair
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_transformers(tmp_path, MeshOptions(fsdp=8).build())
    assert loaded.layers.ffn.up.kernel.get_value().sharding.spec[1] == "fsdp"
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(encoder))


def test_other_models_and_weights_are_refused(pair, tmp_path):
    _, _, folder = pair
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: give the folder of a T5"):
        load_transformers(tmp_path)
    for change, message in (
        ({"model_type": "bert"}, r"model_type='bert'; expected one of \['t5', 'umt5'\]"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported; expected 'gated-gelu'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_layers": 4}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        WeightsError, match=r"encoder\.block\.3\.layer\.1\.DenseReluDense\.wo\.weight: missing"
    ):
        load_transformers(tmp_path)


def test_distances_share_buckets_by_their_logarithm():
    buckets = relative_buckets(300, 32, 128)
    assert buckets[0, 0] == 0 and list(buckets[5, 6:9]) == [17, 18, 19] and list(buckets[5, 2:5]) == [3, 2, 1]
    assert buckets[0, 8] == buckets[0, 11] == 24 and buckets[0, 12] == 25
    assert buckets[0, 128] == buckets[0, 299] == 31 and buckets[299, 0] == 15


def test_names_of_umt5_xxl():
    encoder = nnx.eval_shape(lambda: T5Encoder(VARIANTS["umt5-xxl"], rngs=nnx.Rngs(0)))
    leaves = named_leaves(nnx.state(encoder, graph=False))
    with torch.device("meta"):
        config = transformers.UMT5Config(
            vocab_size=256_384,
            d_model=4096,
            d_ff=10_240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        reference = transformers.UMT5EncoderModel(config)
    shapes, original = {}, {}
    for name, leaf in leaves.items():
        shapes |= transformers_names(leaves)[name].external_shapes(tuple(leaf.shape))
        original |= wan_names(leaves)[name].external_shapes(tuple(leaf.shape))
    expected = {name: tuple(x.shape) for name, x in reference.named_parameters()}
    assert shapes == expected
    assert original["blocks.23.pos_embedding.embedding.weight"] == (32, 64)
    assert original["blocks.0.ffn.gate.0.weight"] == (10_240, 4096)
    assert len(original) == len(shapes)
