"""Models with random weights everywhere: nothing is hidden behind a zero, and no initialiser is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidgen.core.tree import named_leaves


def random_module(make, seed=0):
    """`make()` with matrices that keep the size of what they multiply, and gains, biases and buffers near
    those of a trained model."""
    rng = np.random.default_rng(seed)
    abstract = nnx.eval_shape(make)
    leaves = [_value(name, leaf.shape, rng) for name, leaf in named_leaves(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _value(name, shape, rng):
    noise = rng.normal(size=shape)
    last = name.rsplit(".", 1)[-1]
    if last in ("scale", "latents_variance"):
        value = np.exp(0.2 * noise)
    elif last == "kernel":
        fan_in = shape[-2] if len(shape) < 5 else np.prod(shape[:-1])
        value = noise * fan_in**-0.5
    else:
        value = 0.3 * noise
    return jnp.asarray(value, jnp.float32)
