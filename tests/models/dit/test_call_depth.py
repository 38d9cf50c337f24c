"""Few calls lie between the transformer and an attention kernel."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import vidgen
from tests.models.dit.call import velocity
from vidgen.models.dit.config import DiTConfig
from vidgen.models.dit.model import DiT
from vidgen.ops.attention_blocks import Blocks
from vidgen.pallas_kernels.attention import gpu, tpu

MOST = 8
"""Calls from `DiT.__call__` to the kernel."""


def frames():
    """Functions of vidgen that the caller's caller runs in, the innermost first."""
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
def test_calls_between_the_transformer_and_the_kernel(monkeypatch, implementation, owner):
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

    def call(latents, timestep, text):
        return velocity(DiT(config, rngs=nnx.Rngs(0)), latents, timestep, text)

    shapes = (1, 1, 8, 8, 4), (1,), (1, 5, 8)
    jax.eval_shape(call, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert len(stacks) == 2, "self-attention and cross-attention"
    for stack in stacks:
        assert stack.index("DiT.__call__") + 1 <= MOST, stack
