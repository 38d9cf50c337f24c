import jax

from tests.pallas_kernels.qk_norm_rope.cases import NormRopeCases
from vidgen.pallas_kernels.qk_norm_rope import reference


class TestReference(NormRopeCases):
    norm_rope = staticmethod(jax.jit(reference.norm_rope, static_argnames=("eps", "scale")))
