"""Variable types: trained parameters with logical axis names, and buffers."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array


class Buffer(nnx.Variable):
    """Model state that gradients do not train, such as latent statistics."""


class Constant(nnx.Variable):
    """A weight that is not trained and comes from a source outside the run: no part of its checkpoints."""


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


def freeze(module: Module, kind: type[nnx.Variable] = Buffer, *, bf16_pattern: str | None = None) -> Module:
    """`module` with parameters of another kind: they get no gradients, optimizer moments or averages.

    Args:
      kind: `Buffer`, or `Constant`.
      bf16_pattern: regular expression for the full names of parameters to store in bfloat16.
    """

    def frozen(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        in_bf16 = bf16_pattern is not None and re.fullmatch(bf16_pattern, name)
        value = variable.get_value()
        return kind(value.astype(jax.numpy.bfloat16) if in_bf16 else value, **_axes(variable))

    return _replace(module, nnx.Param, frozen)


def thaw(module: Module) -> Module:
    """`module` with `Constant`s as parameters."""
    return _replace(module, Constant, lambda _, variable: nnx.Param(variable.get_value(), **_axes(variable)))


def _replace(module: Module, kind: type[nnx.Variable], make: Callable[..., nnx.Variable]) -> Module:
    """`module` with `make(path, variable)` in place of its variables of one kind."""
    replaced = lambda path, leaf: make(path, leaf) if isinstance(leaf, kind) else leaf  # noqa: E731
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(replaced, module, is_leaf=is_variable)


def _axes(variable: nnx.Variable) -> dict[str, Any]:
    return {"axes": variable.get_metadata("axes")}


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
