import jax

from pallas_kernels.qk_norm_rope import reference
from tests.pallas_kernels.qk_norm_rope.cases import NormRopeCases


class TestReference(NormRopeCases):
    norm_rope = staticmethod(jax.jit(reference.norm_rope, static_argnames=("eps", "scale")))
