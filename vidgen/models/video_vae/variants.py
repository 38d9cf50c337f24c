"""Prints a table of the named variants' sizes: `python -m vidgen.models.video_vae.variants`."""

import math
from collections.abc import Iterable

import jax
from flax import nnx

from vidgen.models.video_vae.config import VARIANTS, VAEConfig
from vidgen.models.video_vae.model import VideoVAE

__all__ = ["parameters", "table"]


def parameters(config: VAEConfig) -> tuple[int, int]:
    """Number of parameters of the encoder and of the decoder; nothing is computed."""
    vae = nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    return _count(vae.encoder, vae.quant_conv), _count(vae.decoder, vae.post_quant_conv)


def table(names: Iterable[str] = tuple(VARIANTS)) -> str:
    """Markdown table with one line per variant.

    Columns: pixels per latent pixel (frames x rows x columns), latent channels, compression (numbers of a
    video per number of its latents), millions of parameters of the encoder and of the decoder.
    """
    lines = [
        "| variant | pixels per latent | channels | compression | encoder | decoder |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        config = VARIANTS[name]
        factors = (config.temporal_factor, config.spatial_factor, config.spatial_factor)
        ratio = 3 * math.prod(factors) / config.latent_channels
        millions = " | ".join(f"{count / 1e6:.1f} M" for count in parameters(config))
        pixels = " x ".join(map(str, factors))
        lines.append(f"| `{name}` | {pixels} | {config.latent_channels} | {ratio:g} | {millions} |")
    return "\n".join(lines)


def _count(*modules: nnx.Module) -> int:
    return sum(
        leaf.size for module in modules for leaf in jax.tree.leaves(nnx.state(module, nnx.Param, graph=False))
    )


if __name__ == "__main__":
    print(table())
