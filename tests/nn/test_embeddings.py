import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.nn.embeddings import apply_rope, grid_positions, rope_angles, timestep_embedding


def test_timestep_embedding_is_that_of_1000_t():
    t = np.array([0.0, 0.25, 1.0])
    angles = 1000.0 * t[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # The largest angle is 1000; float32 knows it to 6e-5.
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t, jnp.float32), 8), expected, atol=1e-4)


def test_timestep_embedding_of_tokens_and_16_bit_times():
    t = jnp.asarray([[0.0, 0.5], [0.75, 1.0]])
    per_token = timestep_embedding(t, 6)
    assert per_token.shape == (2, 2, 6)
    np.testing.assert_array_equal(per_token[1, 0], timestep_embedding(t[1, :1], 6)[0])
    assert timestep_embedding(t.astype(jnp.bfloat16), 6).dtype == jnp.float32


def test_grid_positions_put_time_slowest():
    positions = grid_positions(2, 1, 3)
    assert positions.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 0, 2]]


@pytest.mark.parametrize(
    ("head_dim", "split"), [(128, (22, 21, 21)), (24, (4, 4, 4)), (64, (12, 10, 10)), (8, (2, 1, 1))]
)
def test_pairs_are_shared_out_as_in_wan(head_dim, split):
    unit = np.eye(3, dtype=np.int32)[:, None]  # one axis at a time
    angles = rope_angles(unit, head_dim)[:, 0]
    assert angles.shape == (3, head_dim // 2)
    starts = np.cumsum((0, *split))
    for axis in range(3):
        begin, end = starts[axis], starts[axis + 1]
        own = 10_000.0 ** (-np.arange(split[axis]) / split[axis])
        np.testing.assert_allclose(angles[axis, begin:end], own, rtol=1e-6)
        assert not np.delete(angles[axis], np.arange(begin, end)).any()


def test_rope_rotates_neighbouring_pairs():
    x = jnp.asarray([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    angles = jnp.asarray([np.pi / 2, np.pi]).reshape(1, 1, 2)
    np.testing.assert_allclose(apply_rope(x, angles)[0, 0, 0], [0.0, 1.0, 0.0, -2.0], atol=1e-6)


@pytest.fixture(scope="module")
def heads():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 2, 24)), jnp.float32)


def dot_product(query, key, query_at, key_at):
    rotate = lambda x, at: apply_rope(x, rope_angles(np.array([[at]], np.int32), 24))  # noqa: E731
    return np.asarray((rotate(query, query_at) * rotate(key, key_at)).sum(-1))


def test_dot_products_depend_on_differences_of_positions_alone(heads):
    query, key = heads
    here = dot_product(query, key, (3, 1, 4), (1, 5, 0))
    np.testing.assert_allclose(dot_product(query, key, (10, 21, 4), (8, 25, 0)), here, rtol=1e-4)
    for axis in range(3):
        moved = np.array((1, 5, 0))
        moved[axis] += 1
        assert not np.allclose(dot_product(query, key, (3, 1, 4), tuple(moved)), here, rtol=1e-2)


def test_rope_keeps_lengths_and_dtype(heads):
    query, _ = heads
    turned = apply_rope(query, rope_angles(np.array([[(7, 3, 2)]], np.int32), 24))
    assert not np.allclose(turned, query, atol=0.1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-6)
    angles = rope_angles(np.zeros((1, 1, 3), np.int32), 24)
    still = apply_rope(query.astype(jnp.bfloat16), angles)
    assert still.dtype == jnp.bfloat16
    np.testing.assert_array_equal(still, query.astype(jnp.bfloat16))
