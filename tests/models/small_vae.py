"""The video VAE that tests of commands and scores use: 2 frames and 4 x 4 pixels to a latent."""

from vidgen.models.video_vae.config import VAEConfig

CONFIG = VAEConfig(
    base_dim=4,
    latent_channels=3,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    patch_size=2,
)
