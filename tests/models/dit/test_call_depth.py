"""Few calls lie between the transformer and an attention kernel."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import vidgen
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.modules import Block
from vidgen.ops.attention_blocks import Blocks
from vidgen.pallas_kernels.attention import gpu, tpu

MOST = 8
"""Calls from `DiT.__call__` to the kernel."""
ABOVE = 3
"""Functions that each make one of these calls above a block: `DiT.__call__`, `apply_stack` and its `body`."""


def frames():
    """Functions of vidgen that the caller runs in, the innermost first."""
    root, frame = str(pathlib.Path(vidgen.__file__).parent), sys._getframe(2)
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(root):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return found


@pytest.mark.parametrize(
    ("implementation", "owner"), [("pallas_tpu", tpu), ("pallas_gpu", gpu), ("blocks", Blocks)]
)
def test_calls_between_a_block_and_the_kernel(monkeypatch, implementation, owner):
    stacks, forward = [], owner.forward

    def recorded(*arguments, **options):
        stacks.append(frames())
        return forward(*arguments, **options)

    monkeypatch.setattr(owner, "forward", recorded)
    config = DiTConfig(
        in_channels=4,
        model_dim=64,
        num_layers=1,
        num_heads=1,
        ffn_dim=32,
        text_dim=8,
        freq_dim=8,
        attention=implementation,
    )

    def call(x, modulation, angles, text):
        return Block(config, rngs=nnx.Rngs(0))(x, modulation=modulation, angles=angles, text=text)

    shapes = (1, 16, 64), (1, 1, 6, 64), (1, 16, 32), (1, 5, 64)
    jax.eval_shape(call, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert len(stacks) == 2, "self-attention and cross-attention"
    for stack in stacks:
        assert stack[-1] == "Block.__call__" and ABOVE + len(stack) <= MOST, stack
