"""The same weights in diffusers' WanTransformer3DModel give the same velocity and gradients."""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests.models.dit.call import velocity
from vidgen.ckpt.weights import WeightsError
from vidgen.core.streams import IMAGE, TEXT
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import VARIANTS
from vidgen.models.dit.diffusers_folder import load_diffusers, read_config, save_diffusers
from vidgen.models.dit.params import diffusers_names, wan_names
from vidgen.models.dit.streams import AttendedStream
from vidgen.parallel.mesh import MeshOptions

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
WanTransformer3DModel = pytest.importorskip(
    "diffusers", reason="needs the extra `parity`"
).WanTransformer3DModel

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 20,
    "num_layers": 2,
}
IMAGE_TO_VIDEO = {"in_channels": 9, "image_dim": 14, "added_kv_proj_dim": 24}
STRUCTURES = {
    "2.1 T2V": {},
    "2.1 I2V": IMAGE_TO_VIDEO,
    "2.1 FLF2V": {**IMAGE_TO_VIDEO, "pos_embed_seq_len": 10},
    "2.2 TI2V": {"in_channels": 6, "out_channels": 6},
    "2.2 I2V A14B": {"in_channels": 9},
}
TOKENS = 512
"""Of the text; diffusers takes what comes before the last 512 for the image's."""


@pytest.fixture(scope="module", params=STRUCTURES.items(), ids=STRUCTURES.keys())
def pair(request, tmp_path_factory):
    """A randomly initialised reference, ours with its weights, the folder, and inputs."""
    name, changed = request.param
    folder = tmp_path_factory.mktemp("transformer")
    torch.manual_seed(0)
    reference = WanTransformer3DModel(**{**SMALL, **changed})
    with torch.no_grad():
        for path, parameter in reference.named_parameters():
            if path.endswith(("bias", "pos_embed")) or "norm" in path:
                parameter.add_(0.3 * torch.randn_like(parameter))
        reference.proj_out.weight.mul_(2.0)
    reference.save_pretrained(folder)
    rng = np.random.default_rng(0)
    config = reference.config
    inputs = {
        "latents": rng.normal(size=(2, 2, 4, 6, config.in_channels)),
        "timestep": rng.uniform(size=(2, 2 * 2 * 3) if name == "2.2 TI2V" else 2),
        "text": rng.normal(size=(2, TOKENS, config.text_dim)),
    }
    if config.image_dim:
        images = 2 if config.pos_embed_seq_len else 1
        inputs["image"] = rng.normal(size=(2 * images, 5, config.image_dim))
    return (
        reference,
        load_diffusers(folder),
        folder,
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs),
    )


def run(reference, latents, timestep, text, image=None):
    """What diffusers' model gives, in our layout."""
    to_torch = lambda x: torch.from_numpy(np.array(x))  # noqa: E731
    velocity = reference(
        to_torch(latents.transpose(0, 4, 1, 2, 3)),
        to_torch(1000.0 * timestep),
        to_torch(text),
        None if image is None else to_torch(image),
    ).sample
    return velocity.permute(0, 2, 3, 4, 1)


def test_velocity_and_the_gradients_of_each_block(pair):
    reference, dit, _, inputs = pair
    expected = run(reference, **inputs)
    weight = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    reference.zero_grad()
    (expected * torch.from_numpy(weight)).sum().backward()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def with_gradients(dit):
        graphdef, params = nnx.split(dit, graph=False)

        def loss(params):
            found = velocity(nnx.merge(graphdef, params), **inputs)
            return (found * weight).sum(), found

        return jax.grad(loss, has_aux=True)(params)

    gradients, found = with_gradients(dit)
    expected = expected.detach().numpy()
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, expected.std())
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    names = diffusers_names(dit.config, named_leaves(gradients))
    errors, norms = collections.Counter(), collections.Counter()
    for ours, gradient in named_leaves(gradients).items():
        mapping, gradient = names[ours], np.asarray(gradient)
        layers = list(gradient) if mapping.stacked else [gradient]
        for name, layer in zip(mapping.external_shapes(gradient.shape), layers, strict=True):
            part = ".".join(name.split(".")[:2])  # A block, or a layer outside of them.
            for place in (part, "whole"):
                errors[place] += np.square(mapping.to_external(layer) - theirs[name]).sum(dtype=np.float64)
                norms[place] += np.square(theirs[name]).sum(dtype=np.float64)
    assert {place: error for place, error in errors.items() if error > 1e-10 * norms[place]} == {}


def test_each_block_alone(pair):
    reference, dit, _, inputs = pair
    captured = []
    hooks = [
        block.register_forward_hook(lambda _, arguments, output: captured.append((arguments, output)))
        for block in reference.blocks
    ]
    with torch.no_grad():
        run(reference, **inputs)
    for hook in hooks:
        hook.remove()
    config = dit.config
    cos = captured[0][0][3][0].numpy()[0, :, 0, 0::2]
    for index, ((x, text, modulation, _), output) in enumerate(captured):
        block = jax.tree.map(lambda leaf: leaf[index], dit.blocks)  # noqa: B023
        x, text, modulation = (jnp.asarray(array.numpy()) for array in (x, text, modulation))
        streams = {TEXT: AttendedStream(text[:, -TOKENS:], None)}
        if config.image_dim:
            streams[IMAGE] = AttendedStream(text[:, :-TOKENS], None)
        time_ids = jnp.tile(jnp.arange(modulation.shape[1]), (2, 1)) if modulation.ndim == 4 else None
        modulation = modulation if modulation.ndim == 4 else modulation[:, None]
        angles = positions(config)
        np.testing.assert_allclose(np.cos(angles[0]), cos, atol=1e-6)
        conditions = {"time_ids": time_ids, "angles": angles, "token_ranges": None, "streams": streams}
        found, _ = block(x, modulation=modulation, **conditions)
        expected = output.numpy()
        assert np.abs(found - expected).max() <= 1e-5 * max(1.0, expected.std())


def positions(config):
    from vidgen.nn.embeddings import grid_positions, rope_angles

    return rope_angles(grid_positions(2, 2, 3)[None], config.head_dim)


def test_what_is_exported_loads_in_diffusers_and_is_the_same(pair, tmp_path):
    reference, dit, folder, _ = pair
    save_diffusers(dit, tmp_path)
    loaded, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, expected in reference.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), expected.numpy(), err_msg=name)
    original, exported = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert exported == {name: original[name] for name in exported}


def test_several_files_are_laid_over_a_mesh(pair, tmp_path):
    reference, dit, _, _ = pair
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    mesh = MeshOptions(fsdp=2, tensor=2, data=2).build()
    loaded = load_diffusers(tmp_path, mesh)
    kernel = loaded.blocks.self_attention.query.kernel.get_value()
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(dit))


def test_original_names_are_what_diffusers_converts(pair):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    reference, dit, _, _ = pair
    leaves = named_leaves(nnx.state(dit, graph=False))
    expand = lambda names: [  # noqa: E731
        theirs for name, mapping in names.items() for theirs in mapping.external_shapes(leaves[name].shape)
    ]
    ours, original = expand(diffusers_names(dit.config, leaves)), expand(wan_names(dit.config, leaves))
    assert set(ours) == reference.state_dict().keys()
    converted = convert_wan_transformer_to_diffusers(dict(zip(original, ours, strict=True)))
    if dit.config.image_positions:  # It does not know this one (0.42).
        positions = "condition_embedder.image_embedder.pos_embed"
        assert converted.pop("img_emb.emb_pos") == positions
        ours.remove(positions)
    assert converted == {name: name for name in ours}


def test_models_that_ours_is_not_are_refused(pair, tmp_path):
    _, _, folder, _ = pair
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: give the folder `transformer`"):
        load_diffusers(tmp_path)
    for change, message in (
        ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel'; expected 'WanTrans"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False is not supported; expected True"),
        ({"image_dim": 14, "added_kv_proj_dim": 8}, "added_kv_proj_dim=8 is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "ffn_dim": 21}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(
        WeightsError, match=r"(?s)6 tensors.*blocks\.1\.ffn\.net\.2\.weight: \(24, 20\) in the"
    ):
        load_diffusers(tmp_path)


def test_an_image_where_none_is_expected_and_the_other_way_around(pair):
    _, dit, _, inputs = pair
    without = {name: array for name, array in inputs.items() if name != "image"}
    if "image" in inputs:
        with pytest.raises(ValueError, match=r"the stream 'image' is missing, .* \(image_dim\)"):
            velocity(dit, **without)
    else:
        with pytest.raises(ValueError, match="the model takes no stream 'image'; it takes text"):
            velocity(dit, **without, image=jnp.zeros((2, 5, 14)))


PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.2-ti2v-5b": 4_999_787_712,
    "wan2.1-t2v-14b": 14_288_491_584,
}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("wan")])
def test_variants_have_the_tensors_that_diffusers_makes(name):
    from vidgen.models.dit.diffusers_folder import _values
    from vidgen.models.dit.model import DiT

    config = VARIANTS[name]
    with torch.device("meta"):
        values = _values(config)
        del values["_class_name"]
        reference = WanTransformer3DModel(**values)
    dit = nnx.eval_shape(lambda: DiT(dataclasses.replace(config), rngs=nnx.Rngs(0)))
    leaves = named_leaves(nnx.state(dit, graph=False))
    names = diffusers_names(config, leaves)
    shapes = {}
    for ours, leaf in leaves.items():
        shapes |= names[ours].external_shapes(tuple(leaf.shape))
    assert shapes == {name: tuple(x.shape) for name, x in reference.state_dict().items()}
    if name in PARAMETERS:
        assert sum(x.numel() for x in reference.parameters()) == PARAMETERS[name]
