"""Products of activations and weights."""

from vidgen.core.typing import Array, Float
from vidgen.parallel.rules import is_sharded


def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """`x @ kernel`, as a product of two matrices unless tokens are sharded over the mesh.

    With more than two axes XLA (jax 0.10) on CPUs makes a transposed copy of `x` for the gradient of `kernel`
    and computes the producers of `x` in that layout: a transformer's training step takes a fifth longer.
    """
    if x.ndim < 3 or is_sharded("tokens"):
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
