"""What every norm and rotation is tested on, against float64 in NumPy: inherit `NormRopeCases`."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from vidgen.pallas_kernels.qk_norm_rope.rotation import rotation

TOLERANCE = {"bfloat16": 4e-3, "float32": 2e-6}
"""Of the root of the mean squared error, relative to that of what is expected."""
EPS = 1e-4


def exact(x, weight, angles, cotangent, scale):
    """Result and gradients of x and weight, in float64; x and cotangent are `b s (n k)`."""
    x, weight, angles, cotangent = (np.asarray(part, np.float64) for part in (x, weight, angles, cotangent))
    turns = scale * np.exp(1j * angles)[:, :, None]
    shape = *x.shape[:2], -1, turns.shape[-1]
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    normed = x * inverse
    pairs = lambda y: np.ascontiguousarray(y).view(np.complex128).reshape(shape)  # noqa: E731
    flat = lambda z: np.ascontiguousarray(z).view(np.float64).reshape(x.shape)  # noqa: E731
    result = flat(pairs(normed * weight) * turns)
    turned = flat(pairs(cotangent) * turns.conj())
    of_normed = turned * weight
    dx = inverse * (of_normed - normed * (of_normed * normed).mean(-1, keepdims=True))
    return result, dx, (turned * normed).sum((0, 1))


def error(found, expected):
    """Root of the mean squared error, relative to that of what is expected."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


class NormRopeCases:
    """Inherit it, name it `Test...`, and set `norm_rope`, a static method, called as the reference's is."""

    norm_rope = None
    heads = ((2, 64), (4, 96), (3, 128), (2, 192), (1, 256))
    """Heads and their channels."""
    lengths = (1, 16, 40, 61)
    batch = 2

    def pytest_generate_tests(self, metafunc):
        values = {
            "dtype": list(TOLERANCE),
            "heads": self.heads,
            "length": self.lengths,
            "clips": (1, self.batch),
        }
        for name, of_it in values.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, of_it, ids=str)

    def inputs(self, *, heads=(2, 64), length=40, clips=1, dtype="float32"):
        """X and cotangent, `b s (n k)`, weight and angles."""
        count, head_dim = heads
        rng = np.random.default_rng(3)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
        x, cotangent = (3 * normal(self.batch, length, count * head_dim) for _ in range(2))
        angles = jnp.asarray(rng.uniform(-90, 90, (clips, length, head_dim // 2)), jnp.float32)
        return x.astype(dtype), 1 + 0.3 * normal(count * head_dim), angles, cotangent.astype(dtype)

    def run(self, x, weight, angles, cotangent, **options):
        """Result and gradients of x and weight."""
        function = lambda x, weight: self.norm_rope(x, weight, angles, eps=EPS, **options)  # noqa: E731
        result, pullback = jax.vjp(function, x, weight)
        return result, *pullback(cotangent)

    def check(self, arrays, *, scale=1.0, **options):
        """Result and gradients are as in float64."""
        x, weight, *_ = arrays
        found = self.run(*arrays, scale=scale, **options)
        expected = exact(*arrays, scale)
        assert [part.dtype for part in found] == [x.dtype, x.dtype, weight.dtype]
        errors = {
            name: error(*pair)
            for name, *pair in zip(("result", "dx", "dweight"), found, expected, strict=True)
        }
        limits = {**dict.fromkeys(errors, TOLERANCE[str(x.dtype)]), "dweight": TOLERANCE[str(weight.dtype)]}
        assert all(errors[name] <= limits[name] for name in errors), errors
        return found

    def test_heads(self, heads, dtype):
        self.check(self.inputs(heads=heads, dtype=dtype))

    def test_lengths(self, length, dtype):
        self.check(self.inputs(length=length, dtype=dtype))

    def test_angles_of_each_clip_or_the_same_for_all(self, clips):
        self.check(self.inputs(clips=clips))

    def test_scale_is_before_rounding(self, dtype):
        self.check(self.inputs(dtype=dtype), scale=0.1275)

    def test_weight_in_bfloat16(self):
        x, weight, angles, cotangent = self.inputs(dtype="bfloat16")
        self.check((x, weight.astype(jnp.bfloat16), angles, cotangent))

    def test_heads_as_an_axis_of_their_own(self):
        x, weight, angles, cotangent = self.inputs()
        split = lambda y: y.reshape(*y.shape[:2], 2, 64)  # noqa: E731
        flat = self.run(x, weight, angles, cotangent)
        found = self.run(split(x), weight, angles, split(cotangent))
        np.testing.assert_array_equal(found[0], split(flat[0]))
        np.testing.assert_array_equal(found[1], split(flat[1]))
        np.testing.assert_array_equal(found[2], flat[2])

    def test_a_table_made_once_is_as_good_as_angles(self, heads):
        x, weight, angles, cotangent = self.inputs(heads=heads)
        for own, table in zip(
            self.run(x, weight, angles, cotangent),
            self.run(x, weight, rotation(angles), cotangent),
            strict=True,
        ):
            np.testing.assert_allclose(own, table, rtol=1e-5, atol=1e-5)

    def test_gradients_are_those_of_the_function(self):
        x, weight, angles, _ = self.inputs(length=5)
        jax.test_util.check_grads(
            lambda x, weight: self.norm_rope(x, weight, angles, eps=EPS),
            (x, weight),
            order=1,
            modes=["rev"],
            eps=1e-2,
            atol=1e-3,
            rtol=1e-3,
        )

    def test_angles_get_no_gradient(self):
        x, weight, angles, _ = self.inputs(length=3)
        gradient = jax.grad(lambda angles: self.norm_rope(x, weight, angles, eps=EPS).sum())(angles)
        assert not np.asarray(gradient).any()

    def test_zeros_are_given_back(self):
        x, weight, angles, cotangent = self.inputs(length=17)
        result, dx, _ = self.run(jnp.zeros_like(x), weight, angles, cotangent)
        assert not np.asarray(result).any() and np.isfinite(dx).all()

    def test_large_numbers(self):
        """Of which the squares are still float32."""
        x, weight, angles, cotangent = self.inputs()
        self.check((x.at[:, ::3].multiply(1e6), weight, angles, cotangent))

    def test_tokens_cut_over_devices(self):
        """The gradient of the weight is summed over them."""
        mesh = jax.make_mesh((2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        cut = jax.P(None, "context")
        function = lambda x, weight, angles: self.norm_rope(x, weight, angles, eps=EPS)  # noqa: E731
        parts = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(cut, jax.P(), cut),
            out_specs=cut,
            check_vma=False,  # Interpreted kernels have no such types.
        )
        x, weight, angles, cotangent = self.inputs()
        result, pullback = jax.vjp(lambda x, weight: jax.jit(parts)(x, weight, angles), x, weight)
        expected = self.run(x, weight, angles, cotangent)
        for found, whole in zip((result, *pullback(cotangent)), expected, strict=True):
            np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)

    def test_shapes_that_do_not_fit(self):
        x, weight, angles, _ = self.inputs()
        with pytest.raises((ValueError, TypeError)):
            self.norm_rope(x, weight, jnp.concatenate([angles] * 3), eps=EPS)
