"""A video VAE and its discriminator as one module."""

from flax import nnx

from vidgen.models.discriminator.config import DiscriminatorConfig
from vidgen.models.discriminator.model import Discriminator
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE


class AdversarialVAE(nnx.Module):
    """VAE and discriminator, trained together; only the VAE is evaluated and exported."""

    def __init__(self, vae: VAEConfig, discriminator: DiscriminatorConfig, *, rngs: nnx.Rngs):
        # VAE first: its initial weights then equal those of a VAE without a discriminator.
        self.vae = VideoVAE(vae, rngs=rngs)
        self.discriminator = Discriminator(discriminator, rngs=rngs)
