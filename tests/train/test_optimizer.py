import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.train.small_vae import ADVERSARIAL
from vidgen.core.tree import named_leaves
from vidgen.models.dit.config import VARIANTS
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.nn.lora import LoRAOptions
from vidgen.train.optimizer import AdamW, Muon, cosine_schedule
from vidgen.train.phases import transformation
from vidgen.train.task import Phase
from vidgen.train.text_to_video_task import TextToVideoTask

DIT = dataclasses.replace(VARIANTS["tiny"], text_dim=32)
TEXT = ByteEncoderConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=32, max_bytes=16)


def test_schedule_rises_linearly_and_falls_along_a_cosine():
    schedule = cosine_schedule(2.0, warmup_steps=10, num_steps=110, end=0.1)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(111)))
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2 * (0.1 + 0.9 * 0.5), rel=1e-5)
    assert rates[110] == pytest.approx(0.2, rel=1e-5)
    assert np.all(np.diff(rates[10:]) < 0)
    assert float(cosine_schedule(1.0, warmup_steps=0, num_steps=1, end=0.0)(0)) == 1.0


def params():
    def make(index, shape, *axes):
        return nnx.Param(np.random.default_rng(index).standard_normal(shape, np.float32), axes=axes)

    return nnx.State(
        {
            "matrix": make(0, (6, 4), "embed", "mlp"),
            "stack": make(1, (3, 6, 4), "layers", "embed", "mlp"),
            "heads": make(2, (6, 2, 4), "embed", "heads", "head_dim"),
            "out": make(3, (3, 2, 4, 6), "layers", "heads", "head_dim", "embed"),
            "bias": make(4, (4,), "mlp"),
            "gains": make(5, (3, 4), "layers", "mlp"),
            "table": make(6, (3, 6, 4), "layers", None, "embed"),
            "tokens": make(7, (9, 4), "vocab", "embed"),
            "conv": make(8, (3, 3, 3, 4, 4), None, None, None, "conv_in", "conv_out"),
        }
    )


def updates(optimizer, grads):
    tx = optimizer.transformation(100)
    result = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params())
    return {name: np.asarray(value[...]) for name, value in result.items()}


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_only_what_mixes_two_axes_decays(optimizer):
    zeros = jax.tree.map(np.zeros_like, params())
    found = updates(optimizer(learning_rate=1.0, weight_decay=0.5, warmup_steps=0), zeros)
    decayed = {"matrix", "stack", "heads", "out", "tokens", "conv"}
    for name, value in params().items():
        if name in decayed:
            np.testing.assert_allclose(found[name], -0.5 * value[...], rtol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], 0)


def test_muon_orthogonalises_each_matrix_of_a_stack_and_leaves_the_rest_to_adam():
    grads = jax.tree.map(lambda x: np.sign(x) * (0.1 + np.abs(x)), params())
    found = updates(Muon(learning_rate=1.0, weight_decay=0.0, warmup_steps=0), grads)

    def spread(matrix):
        values = np.linalg.svd(matrix, compute_uv=False)
        return values.max() / values.min()

    matrices = [
        found["matrix"],
        *found["stack"],
        found["heads"].reshape(6, 8),
        *found["out"].reshape(3, 8, 6),
        found["conv"].reshape(108, 4),
    ]
    for matrix in matrices:
        assert spread(matrix) < 2.0  # Newton-Schulz brings singular values into about [0.7, 1.2].
    assert spread(np.asarray(grads["matrix"][...])) > 2.0
    # Adam's first step is the sign of the gradient; Nesterov makes it 1 + 0.9 * 0.1 / 0.19 times as long.
    for name in ("bias", "gains", "table", "tokens"):
        np.testing.assert_allclose(found[name], -1.4736842 * np.sign(grads[name][...]), rtol=1e-4)


def test_muon_has_a_rate_of_its_own_for_what_adam_updates():
    grads = jax.tree.map(np.cos, params())
    both = Muon(learning_rate=1.0, weight_decay=0.5, warmup_steps=0)
    found, expected = updates(dataclasses.replace(both, adam_learning_rate=0.25), grads), updates(both, grads)
    for name in ("matrix", "stack", "heads", "out", "conv"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    for name in ("bias", "gains", "table"):
        np.testing.assert_allclose(found[name], 0.25 * expected[name], rtol=1e-5)


def test_adamw_is_optax_adamw():
    grads = jax.tree.map(np.cos, params())
    found = updates(AdamW(learning_rate=0.1, weight_decay=0.0, warmup_steps=0), grads)
    tx = optax.adam(0.1, b1=0.9, b2=0.99)
    expected = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value[...], rtol=1e-5)


def no_loss(context):
    raise AssertionError("an optimizer computes no loss")


@pytest.mark.parametrize("main", [AdamW(), Muon()])
def test_parts_that_learn_apart_have_rules_of_their_own(main):
    tree = nnx.State({"rest": params(), "rival": params()})
    grads = jax.tree.map(np.cos, tree)
    rival = AdamW(learning_rate=0.5, warmup_steps=0)
    tx = transformation([Phase(loss=no_loss, optimizers={"": None, "rival": rival})], main, 100)
    state = tx.init(tree)
    found, state = jax.jit(tx.update)(grads, state, tree)
    for name, rule in (("rest", main), ("rival", rival)):
        expected = updates(rule, jax.tree.map(np.cos, params()))
        for key, value in found[name].items():
            np.testing.assert_allclose(value[...], expected[key], rtol=1e-5, atol=1e-7)
    names = named_leaves(state)
    assert not [name for name in names if "inner_states.rival" in name and "rest" in name]
    # Moments carry the axes of their parameters.
    variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    held = [v for v in variables if isinstance(v, nnx.Variable) and jax.tree.leaves(v)]
    axes = [v.get_metadata("axes") for v in held]
    assert axes.count(("vocab", "embed")) == 4


def test_a_module_of_one_part_has_the_optimizers_own_state():
    alone = AdamW().transformation(10).init(params())
    assert jax.tree.structure(
        transformation([Phase(loss=no_loss)], AdamW(), 10).init(params())
    ) == jax.tree.structure(alone)


REAL = {
    "all": TextToVideoTask(vae="unused", dit=DIT, text=TEXT),
    "lora": TextToVideoTask(vae="unused", dit=DIT, text=TEXT, lora=LoRAOptions(targets=".*")),
    "vae": ADVERSARIAL,
}


@pytest.mark.parametrize("name", REAL)
def test_every_matrix_filter_and_table_of_a_model_decays_and_nothing_else(name):
    module = nnx.eval_shape(lambda: REAL[name].build(nnx.Rngs(0)))
    params = nnx.state(module, nnx.Param, graph=False)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    ones = jax.tree.map(jnp.ones_like, zeros)
    tx = AdamW(learning_rate=1.0, weight_decay=0.5, warmup_steps=0).transformation(10)
    found = named_leaves(tx.update(zeros, tx.init(ones), ones)[0])
    matrices = ("kernel", "down", "up", "embedding", "ngram_embedding")
    decayed = {name for name, value in found.items() if np.all(np.asarray(value) == -0.5)}
    assert decayed == {name for name in found if name.split(".")[-1] in matrices} and decayed


def test_muon_with_a_rate_of_zero_leaves_matrices_and_moves_the_rest_at_its_own():
    grads = jax.tree.map(np.ones_like, params())
    found = updates(Muon(learning_rate=0.0, adam_learning_rate=0.5, warmup_steps=0), grads)
    np.testing.assert_array_equal(found["matrix"], 0)
    other = updates(Muon(learning_rate=1.0, adam_learning_rate=0.5, warmup_steps=0), grads)
    np.testing.assert_allclose(found["bias"], other["bias"], rtol=1e-6)
    assert np.all(found["bias"] < -0.4) and np.all(other["matrix"] != 0)
