"""CLIP's image encoder: features of an image's patches."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float
from vidgen.models.clip.config import CLIPVisionConfig
from vidgen.nn.layers import Linear
from vidgen.nn.norms import LayerNorm
from vidgen.nn.stack import apply_stack, make_stack
from vidgen.nn.variables import param
from vidgen.ops.attention import attention
from vidgen.parallel.rules import constrain

_normal = jax.nn.initializers.normal(0.02)


class SelfAttention(nnx.Module):
    """Multi-head attention among all tokens of an image."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads = config.num_heads
        self.query = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.key = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.value = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.out = Linear(dim, dim, axes=("heads", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        query, key, value = (
            project(x).reshape(*x.shape[:2], self.num_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        return self.out(attention(query, key, value).reshape(x.shape))


class EncoderLayer(nnx.Module):
    """Pre-norm self-attention and feed-forward network."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.attention_norm = LayerNorm(config.dim, eps=config.eps, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.ffn_norm = LayerNorm(config.dim, eps=config.eps, rngs=rngs)
        self.up = Linear(config.dim, config.ffn_dim, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(config.ffn_dim, config.dim, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        x = x + self.attention(self.attention_norm(x))
        hidden = self.up(self.ffn_norm(x))
        if self.activation == "gelu":
            hidden = jax.nn.gelu(hidden, approximate=False)
        else:
            hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
        return x + self.down(hidden)


class CLIPVision(nnx.Module):
    """Vision transformer: maps images to features of the class token and the patches."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        features = 3 * config.patch_size**2
        self.config = config
        self.patch_embedding = Linear(
            features, config.dim, axes=("patch", "embed"), use_bias=False, rngs=rngs
        )
        self.whole = param(rngs, _normal, (config.dim,), ("embed",))
        self.positions = param(rngs, _normal, (config.num_tokens, config.dim), (None, "embed"))
        self.norm_in = LayerNorm(config.dim, eps=config.eps, rngs=rngs)
        self.layers = make_stack(lambda rngs: EncoderLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm_out = LayerNorm(config.dim, eps=config.eps, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"], *, skip: int = 1) -> Float[Array, "b m d"]:
        """Features of the class token, then of each patch in row-major order.

        Args:
          images: images from `vidgen.models.clip.images.prepare`.
          skip: number of final layers to skip; Wan's transformers use the output of the last layer but one.

        Raises:
          UserError: the images have another size than `image_size`.
        """
        config, size = self.config, self.config.image_size
        if images.shape[1:3] != (size, size):
            raise UserError(
                f"images are {images.shape[1]} x {images.shape[2]}; the encoder takes {size} x {size}"
            )
        b, side, count = images.shape[0], config.patch_size, size // config.patch_size
        patches = images.reshape(b, count, side, count, side, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embedding(patches.reshape(b, count**2, -1).astype(config.dtype))
        whole = jnp.broadcast_to(self.whole[...].astype(x.dtype)[None, None], (b, 1, config.dim))
        x = jnp.concatenate([whole, x], axis=1) + self.positions[...].astype(x.dtype)[None]
        layers = jax.tree.map(lambda leaf: leaf[: config.num_layers - skip], self.layers)
        return apply_stack(layers, constrain(self.norm_in(x), "batch", None, None), _apply_layer)[0]


def _apply_layer(layer: EncoderLayer, x: Array, _: None) -> tuple[Array, None]:
    return constrain(layer(x), "batch", None, None), None
