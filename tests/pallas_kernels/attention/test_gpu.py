import functools

import jax

from pallas_kernels.attention import gpu
from tests.pallas_kernels.attention.cases import AttentionCases


class TestGpu(AttentionCases):
    forward = staticmethod(jax.jit(functools.partial(gpu.forward, interpret=True), static_argnames="scale"))
    backward = staticmethod(jax.jit(functools.partial(gpu.backward, interpret=True), static_argnames="scale"))
