"""What every attention kernel is tested on, against float64 in NumPy: inherit `AttentionCases`."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.pallas_kernels.attention.masks import HIDDEN, BlockMask, KeyRanges, causal_ranges, segment_ranges

TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 2e-6}
"""Of the root of the mean squared error, relative to that of what is expected."""


def exact(query, key, value, cotangent, mask, scale=None, mean=1.0):
    """Output, log-sum-exp and the three gradients in float64; `mask` is bool, `b s r`.

    The gradient of a score is the difference of two terms. A `mean` of zero leaves the first of them: what
    rounding errors are relative to where the difference is zero, as under a single key.
    """
    q, k, v, g = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = np.where(mask[:, None], scale * np.einsum("bsnk,brnk->bnsr", q, k), -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_sum_exp = (np.where(np.isfinite(largest), largest, 0.0) + np.log(total))[..., 0]
    weights = weights / np.where(total > 0, total, 1.0)
    output = np.einsum("bnsr,brnk->bsnk", weights, v)
    of_weights = np.einsum("bsnk,brnk->bnsr", g, v)
    of_scores = scale * weights * (of_weights - mean * (weights * of_weights).sum(-1, keepdims=True))
    d_query = np.einsum("bnsr,brnk->bsnk", of_scores, k)
    d_key = np.einsum("bnsr,bsnk->brnk", of_scores, q)
    return output, log_sum_exp, d_query, d_key, np.einsum("bnsr,bsnk->brnk", weights, g)


def error(found, expected, terms=0.0):
    """Root of the mean squared error, relative to that of what is expected, or of its terms if that is 0."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    scale = np.sqrt(np.mean(expected**2)) or np.sqrt(np.mean(np.square(terms)))
    difference = np.sqrt(np.mean((found - expected) ** 2))
    return difference / scale if scale else difference


def close_log_sum_exp(found, expected, tolerance):
    """-inf where it should be, and elsewhere as near as float32 sums of such products are."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    finite = np.isfinite(expected)
    assert np.array_equal(found[~finite], expected[~finite])
    bound = tolerance + 2e-6 * np.abs(expected[finite])
    assert np.all(np.abs(found[finite] - expected[finite]) <= bound)


class AttentionCases:
    """Inherit it, name it `Test...`, and set `forward` and `backward`, as static methods.

    They are called as those of `reference.py` are: `scale`, if at all, is a Python number. Sizes are
    attributes, to be smaller where a backend is slow or larger where its blocks are; every head dimension is
    tested once, and everything else with the first of them.
    """

    forward = backward = None
    dtypes = ("bfloat16", "float32")
    head_dims = (64, 96, 128, 192, 256)
    unsupported_head_dims = (24, 512)
    lengths = ((128, 128), (130, 1), (1, 200), (67, 259))
    """Of queries and keys."""
    batch, heads = 2, 2
    length = 160
    """Of queries and keys in the tests of masks: more than a block of a kernel, and not a multiple of it."""
    masked_blocks = (300, 280)
    """Queries and keys under a block mask, not multiples of 128."""

    def pytest_generate_tests(self, metafunc):
        for name in ("head_dim", "lengths", "unsupported_head_dim"):
            if name in metafunc.fixturenames:
                values = getattr(self, name if name == "lengths" else f"{name}s")
                metafunc.parametrize(name, values, ids=str)
        if "dtype" in metafunc.fixturenames:
            # Head dimensions are tested on what is trained with, all else to the last digit.
            quick = "bfloat16" if "head_dim" in metafunc.fixturenames else "float32"
            marks = {dtype: [] if dtype == quick else [pytest.mark.slow] for dtype in self.dtypes}
            metafunc.parametrize("dtype", [pytest.param(d, marks=marks[d], id=d) for d in self.dtypes])

    # What the tests are made of.

    def inputs(self, queries, keys, head_dim=None, dtype="float32", seed=0):
        """Query, key, value, cotangent."""
        rng = np.random.default_rng(seed)
        shape = self.heads, head_dim or self.head_dims[0]
        arrays = (
            rng.standard_normal((self.batch, length, *shape)) for length in (queries, keys, keys, queries)
        )
        return tuple(jnp.asarray(x.astype(np.float32)).astype(dtype) for x in arrays)

    def check(
        self, arrays, *, scale=None, ranges=None, block_mask=None, tolerance=None, channels=slice(None)
    ):
        """Forward and backward are as in float64; returns what was found: output, its log, gradients.

        Of the gradient of queries only some `channels` are compared.
        """
        query, key, value, cotangent = arrays
        tolerance = tolerance or TOLERANCE[str(query.dtype)]
        mask = np.ones((query.shape[0], query.shape[1], key.shape[1]), bool)
        if ranges is not None:
            mask &= np.asarray(ranges.visible())
        if block_mask is not None:
            mask &= np.asarray(block_mask.visible(*mask.shape[1:]))[None]
        expected, terms = exact(*arrays, mask, scale), exact(*arrays, mask, scale, mean=0.0)
        options = {
            **({} if scale is None else {"scale": scale}),
            **({} if ranges is None else {"ranges": ranges}),
            **({} if block_mask is None else {"block_mask": block_mask}),
        }
        output, log_sum_exp = self.forward(query, key, value, **options)
        gradients = self.backward(query, key, value, output, log_sum_exp, cotangent, **options)
        assert output.dtype == value.dtype and log_sum_exp.dtype == jnp.float32
        assert [x.dtype for x in gradients] == [query.dtype, key.dtype, value.dtype]
        close_log_sum_exp(log_sum_exp, expected[1], tolerance)
        errors = {
            "output": error(output, expected[0]),
            "d_query": error(gradients[0][..., channels], expected[2][..., channels], terms[2]),
            "d_key": error(gradients[1], expected[3], terms[3]),
            "d_value": error(gradients[2], expected[4]),
        }
        assert max(errors.values()) <= tolerance, errors
        hidden = ~mask.any(2)
        assert not np.asarray(output)[hidden].any() and not np.asarray(gradients[0])[hidden].any()
        unseen = ~mask.any(1)
        assert not np.asarray(gradients[1])[unseen].any() and not np.asarray(gradients[2])[unseen].any()
        return output, log_sum_exp, *gradients

    def segments(self, *boundaries):
        """`b s` of the default length, contiguous; each example's boundaries are shifted."""
        rows = [
            np.searchsorted(np.asarray(boundaries) + 3 * row, np.arange(self.length), side="right")
            for row in range(self.batch)
        ]
        return jnp.asarray(np.stack(rows))

    # Shapes and dtypes.

    def test_head_dimensions(self, head_dim, dtype):
        self.check(self.inputs(self.length, self.length, head_dim, dtype))

    def test_head_dimensions_that_are_not_supported_say_so(self, unsupported_head_dim):
        query, key, value, cotangent = self.inputs(128, 128, unsupported_head_dim)
        log_sum_exp = jnp.zeros((self.batch, self.heads, 128), jnp.float32)
        with pytest.raises(NotImplementedError, match=str(unsupported_head_dim)):
            self.forward(query, key, value)
        with pytest.raises(NotImplementedError, match=str(unsupported_head_dim)):
            self.backward(query, key, value, query, log_sum_exp, cotangent)

    def test_lengths(self, lengths, dtype):
        self.check(self.inputs(*lengths, dtype=dtype))

    def test_scale(self):
        self.check(self.inputs(self.length, self.length), scale=0.3)

    # What is seen.

    def test_segments(self, dtype):
        ids = self.segments(21, 70, 71, 140)
        mask = jnp.arange(self.length)[None] < jnp.full((self.batch, 1), self.length - 9)
        self.check(
            self.inputs(self.length, self.length, dtype=dtype), ranges=segment_ranges(ids, ids, key_mask=mask)
        )

    def test_segments_of_one_token(self):
        ids = jnp.broadcast_to(jnp.arange(self.length)[None], (self.batch, self.length))
        arrays = self.inputs(self.length, self.length)
        output, *_ = self.check(arrays, ranges=segment_ranges(ids, ids), tolerance=2e-6)
        np.testing.assert_allclose(output, arrays[2], rtol=1e-6, atol=1e-6)

    def test_segments_without_keys_or_queries(self):
        queries, keys = self.segments(40, 90), self.segments(10, 100)
        ranges = segment_ranges(jnp.where(queries == 1, 7, queries), keys)
        _, log_sum_exp, *_ = self.check(self.inputs(self.length, self.length), ranges=ranges)
        assert np.isneginf(log_sum_exp).any() and not np.isneginf(log_sum_exp).all()

    def test_segments_in_any_order(self):
        """Codes need not be sorted: what a block holds is not what its first and last token say."""
        rng = np.random.default_rng(5)
        codes = jnp.asarray(rng.integers(-1, 6, (self.batch, self.length)), jnp.int32)
        low = jnp.asarray(rng.integers(0, 6, (self.batch, self.length)), jnp.int32)
        high = low + jnp.asarray(rng.integers(-1, 3, (self.batch, self.length)), jnp.int32)
        self.check(self.inputs(self.length, self.length), ranges=KeyRanges(codes, low, high))

    @pytest.mark.parametrize("how", ["hidden", "empty ranges", "no blocks"])
    def test_nothing_is_seen(self, how):
        zeros = jnp.zeros((self.batch, self.length), jnp.int32)
        ranges = {
            "hidden": KeyRanges(zeros + HIDDEN, zeros, zeros + 5),
            "empty ranges": KeyRanges(zeros, zeros + 1, zeros),
            "no blocks": None,
        }[how]
        count = -(-self.length // 128)
        blocks = BlockMask(blocks=jnp.zeros((count, count), bool), query_size=128, key_size=128)
        block_mask = blocks if how == "no blocks" else None
        arrays = self.inputs(self.length, self.length)
        found = self.check(arrays, ranges=ranges, block_mask=block_mask)
        assert np.isneginf(found[1]).all()

    def test_causal_over_frames(self, dtype):
        times = jnp.broadcast_to(jnp.arange(self.length)[None] // 24, (self.batch, self.length))
        self.check(self.inputs(self.length, self.length, dtype=dtype), ranges=causal_ranges(times, times))

    @pytest.mark.parametrize("past", [0, 2])
    def test_causal_within_segments_and_a_window(self, past):
        ids = self.segments(50, 130)
        times = jnp.broadcast_to(jnp.arange(self.length)[None] // 16, (self.batch, self.length))
        ranges = causal_ranges(times, times, past=past, segments=(ids, ids))
        self.check(self.inputs(self.length, self.length), ranges=ranges)

    def block_mask(self, queries, keys):
        """Blocks of 128; the first queries see nothing, the last keys are not seen."""
        shape = -(-queries // 128), -(-keys // 128)
        blocks = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 2 == 1
        blocks[0] = blocks[:, -1] = False
        assert blocks.any()
        return BlockMask(blocks=jnp.asarray(blocks), query_size=128, key_size=128)

    def test_block_mask(self):
        queries, keys = self.masked_blocks
        self.check(self.inputs(queries, keys), block_mask=self.block_mask(queries, keys))

    def test_block_mask_of_larger_blocks(self):
        queries, keys = self.masked_blocks
        shape = -(-queries // 256), -(-keys // 128)
        blocks = BlockMask(blocks=jnp.asarray(np.eye(*shape, dtype=bool)), query_size=256, key_size=128)
        self.check(self.inputs(queries, keys), block_mask=blocks)

    def test_block_mask_and_segments(self):
        queries, keys = self.masked_blocks
        own, theirs = (
            jnp.broadcast_to((jnp.arange(n) * 4 // n)[None], (self.batch, n)) for n in self.masked_blocks
        )
        ranges = segment_ranges(own, theirs // 2)
        self.check(self.inputs(queries, keys), ranges=ranges, block_mask=self.block_mask(queries, keys))

    # Numbers.

    def test_large_scores_in_common(self, dtype):
        """Scores near 10,000: float32 holds them to 2**-11, which is then the relative error of weights."""
        arrays = self.inputs(self.length, self.length, dtype=dtype)
        query, key = (
            jnp.concatenate([jnp.full_like(x[..., :1], 100), 0.25 * x[..., 1:]], -1) for x in arrays[:2]
        )
        # Along what all keys have in common the gradient of queries is 100 times a sum that is zero.
        _, log_sum_exp, *_ = self.check(
            (query, key, *arrays[2:]), scale=1.0, tolerance=4e-3, channels=slice(1, None)
        )
        assert np.min(log_sum_exp) > 9_900

    def test_large_scores_of_both_signs(self, dtype):
        """Up to 10,000 or -10,000: one key has all the weight, or nearly, and nothing overflows."""
        query, key, value, cotangent = self.inputs(self.length, self.length, dtype=dtype)
        sign = jnp.where(jnp.arange(self.length) % 2 == 0, 1, -1).astype(dtype)[None, :, None, None]
        query, key = 16 * query.at[..., 0].set(0), 16 * key.at[..., 0].set(0)
        query, key = query.at[..., :1].add(80), key.at[..., :1].add(80 * sign)
        mask = np.ones((self.batch, self.length, self.length), bool)
        expected = exact(query, key, value, cotangent, mask, 1.0)
        assert expected[1].max() > 9_000
        output, log_sum_exp = self.forward(query, key, value, scale=1.0)
        close_log_sum_exp(log_sum_exp, expected[1], 4e-3)
        assert error(output, expected[0]) <= 4e-3
        gradients = self.backward(query, key, value, output, log_sum_exp, cotangent, scale=1.0)
        assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in gradients)
        # The other two gradients are differences of nearly equal numbers.
        assert error(gradients[2], expected[4]) <= 4e-3

    def test_gradients_of_parts_of_the_keys_add_up(self):
        """As around a ring of devices: each part's kernel is given the output and sum over all keys."""
        arrays = self.inputs(self.length, self.length)
        query, key, value, cotangent = arrays
        ids = self.segments(30, 60)
        ranges = segment_ranges(ids, ids)
        halves = [slice(0, self.length // 2), slice(self.length // 2, None)]
        found = [
            self.forward(query, key[:, half], value[:, half], ranges=ranges._replace(codes=ids[:, half]))
            for half in halves
        ]
        log_sum_exp = functools.reduce(jnp.logaddexp, (lse for _, lse in found))
        shares = [jnp.exp(lse - log_sum_exp).swapaxes(1, 2)[..., None] for _, lse in found]
        output = sum(share * part for share, (part, _) in zip(shares, found, strict=True))
        parts = [
            self.backward(
                *(query, key[:, half], value[:, half], output, log_sum_exp, cotangent),
                ranges=ranges._replace(codes=ids[:, half]),
            )
            for half in halves
        ]
        of_queries, of_keys, of_values = zip(*parts, strict=True)
        expected = exact(*arrays, np.asarray(ranges.visible()))
        assert error(output, expected[0]) <= TOLERANCE["float32"]
        assert error(sum(of_queries), expected[2]) <= TOLERANCE["float32"]
        assert error(jnp.concatenate(of_keys, 1), expected[3]) <= TOLERANCE["float32"]
        assert error(jnp.concatenate(of_values, 1), expected[4]) <= TOLERANCE["float32"]

    def test_the_same_twice(self):
        """Sums are in one order."""
        arrays = self.inputs(self.length, self.length, dtype="bfloat16")
        first, second = (self.check(arrays) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
