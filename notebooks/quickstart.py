# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From nothing to a video in five minutes
#
# This trains two tiny models on the sprite world: shapes that move over plain, gradient or textured
# backgrounds, each clip with an exact caption.
#
# 1. a video VAE, which packs 4 frames of 8 x 8 pixels into one latent,
# 2. a diffusion transformer, which makes latents from a caption.
#
# Then it samples a prompt. The models are this small so that a laptop's CPU is enough; the steps are those of
# a large one.
# `jupytext --to ipynb notebooks/quickstart.py` makes a notebook of this file, which Colab opens.

# %%
import os
import pathlib
import subprocess
import sys

# In Colab: where vidgen is installed from, "git+https://..." of its repository or the path of a clone.
# On PyPI the name "vidgen" is another program's.
SOURCE = ""
if "google.colab" in sys.modules:
    if not SOURCE:
        raise ValueError("set SOURCE to the address of the repository, as git+https://github.com/NAME/vidgen")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE], check=True)

# %%
from IPython.display import Image, display

import vidgen

RUNS = pathlib.Path("runs")
VARIANT = os.environ.get(
    "VIDGEN_VARIANT", "demo"
)  # "tiny" is two steps, which only shows that everything runs

# %% [markdown]
# ## The VAE
#
# It learns what shapes look like from images, which are quick, and how they move from clips.
#
# `vidgen train` takes an experiment, a Python file of values, and a folder for what the run writes. Any value
# can be changed on the command line. Running the same command again goes on where it stopped.


# %%
def train(experiment, workdir, *options):
    """Runs `vidgen train` and shows its last lines."""
    file, _, argument = experiment.partition(":")
    config = f"experiments/{file}:{','.join(filter(None, [VARIANT, argument]))}".removesuffix(":")
    command = [
        sys.executable,
        "-m",
        "vidgen.cli.train",
        f"--config={config}",
        f"--workdir={workdir}",
        *options,
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout
    print("\n".join(result.stdout.splitlines()[-8:]))


train("vae/sprites.py:images", RUNS / "vae_images")
train("vae/sprites.py", RUNS / "vae", f"--config.run.init_from={RUNS / 'vae_images'}")

# %% [markdown]
# ## The transformer
#
# It learns to turn noise into the latents of the VAE just trained.

# %%
train("dit/sprites.py", RUNS / "dit", f"--config.task.vae={RUNS / 'vae'}")

# %% [markdown]
# ## A video
#
# `vidgen.load` takes the run's folder. The same seed gives the same video on any number of devices.

# %%
pipe = vidgen.load(RUNS / "dit")
video = pipe("a red circle moves left", num_frames=9, seed=0)
assert video.ndim == 4, video.shape
assert video.shape[0] == 9, video.shape
assert video.dtype == "uint8"
video.shape

# %%
vidgen.save_video("a_red_circle.mp4", video, fps=8)
vidgen.save_video("a_red_circle.gif", video, fps=8)
display(Image(filename="a_red_circle.gif", width=256))

# %% [markdown]
# A model this small, trained this briefly, paints the background and a blob. Set VARIANT to ""
# and give it an hour, or train on a folder of your own: see the README.
