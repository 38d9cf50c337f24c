"""Variable types: trained parameters with logical axis names, and buffers."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array


class Buffer(nnx.Variable):
    """Model state that gradients do not train, such as latent statistics."""


def param(
    rngs: nnx.Rngs,
    init: Callable[..., Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> nnx.Param:
    """A float32 parameter whose dimensions carry logical axis names.

    Args:
      rngs: source of the key, from the stream `params`.
      init: function of (key, shape) in the style of `jax.nn.initializers`.
      shape: shape of the parameter.
      axes: one logical axis name, or None, per dimension; `parallel/rules.py` maps them to mesh axes.

    Raises:
      UserError: `axes` and `shape` differ in length.
    """
    if len(axes) != len(shape):
        raise UserError(f"a parameter of shape {shape} needs {len(shape)} axis names, found {axes}")
    return nnx.Param(init(_next_key(rngs.params), shape), axes=axes)


def _next_key(stream: nnx.RngStream) -> Array:
    """`stream()`. Under tracing the latter takes time in the square of the number of parameters.

    flax 0.12 asks the counter, a tracer, for its sharding; jax answers with an error that prints all that was
    traced so far.
    """
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key


Module = TypeVar("Module", bound=nnx.Module)


def freeze(module: Module) -> Module:
    """`module` with parameters as buffers: they get no gradients, optimizer moments or averages."""

    def frozen(variable: nnx.Variable) -> nnx.Variable:
        if not isinstance(variable, nnx.Param):
            return variable
        return Buffer(variable.get_value(), axes=variable.get_metadata("axes"))

    return jax.tree.map(frozen, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def over_last_axis(vector: Array, x: Array) -> Array:
    """`vector` broadcast to the shape and dtype of `x` (implicit rank promotion is an error in tests).

    Its gradient is one sum over all leading axes. (At batch size 1, a sum that leaves out the batch axis is
    10 times slower with XLA of jax 0.10 on CPUs.)
    """
    return jax.lax.broadcast_in_dim(vector.astype(x.dtype), x.shape, (x.ndim - 1,))


def zeros(_key: Array, shape: tuple[int, ...]) -> Array:
    """Initialiser of biases, and of layers whose output starts at zero."""
    return jax.numpy.zeros(shape)


def ones(_key: Array, shape: tuple[int, ...]) -> Array:
    """Initialiser of norm scales."""
    return jax.numpy.ones(shape)
