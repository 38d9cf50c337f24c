"""A video VAE and the discriminator that it is trained against, as one module."""

from flax import nnx

from vidgen.models.discriminator.config import DiscriminatorConfig
from vidgen.models.discriminator.model import Discriminator
from vidgen.models.video_vae.config import VAEConfig
from vidgen.models.video_vae.model import VideoVAE


class AdversarialVAE(nnx.Module):
    """What is trained together; the VAE alone is what is evaluated and kept."""

    def __init__(self, vae: VAEConfig, discriminator: DiscriminatorConfig, *, rngs: nnx.Rngs):
        # The VAE first: it starts from the same weights as one without a discriminator.
        self.vae = VideoVAE(vae, rngs=rngs)
        self.discriminator = Discriminator(discriminator, rngs=rngs)
