"""The Python face: load a trained run, call it with a prompt."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from vidgen.core.typing import UInt8
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.parallel.rules import shardings
from vidgen.sampling.generate import SamplingOptions, generate
from vidgen.sampling.steppers import AnyStepper, DPMSolver, UniPC
from vidgen.sampling.time_grid import TimeGrid
from vidgen.train.trained import load_trained
from vidgen.train.vae_folder import load_vae

__all__ = ["Pipeline", "load"]


class Pipeline:
    """A text-to-video model, its VAE and the clip size that it was trained on.

    Attributes:
      model: text encoder and transformer.
      vae: the video autoencoder.
      size: default frames, height and width.
      fps: frames per second of the training clips.
      mesh: devices over which weights and batches are laid.
    """

    def __init__(
        self, model: TextToVideo, vae: VideoVAE, *, size: tuple[int, int, int], fps: float, mesh: Mesh
    ):
        self.model = model
        self.vae = vae
        self.size = size
        self.fps = fps
        self.mesh = mesh

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 30,
        guidance_scale: float = 4.0,
        shift: float = 1.0,
        stepper: AnyStepper | None = None,
        seed: int = 0,
    ) -> UInt8[np.ndarray, "t h w 3"] | UInt8[np.ndarray, "b t h w 3"]:
        """A video for a prompt, or one for each of several prompts (seeded by seed, seed + 1, ...).

        Args:
          negative_prompt: what guidance leads away from.
          num_frames: 1 + 4 n for the default VAE; 1 gives an image. Sizes not given are those of training.
          height, width: in pixels, multiples of the VAE's and the transformer's patches together.
          steps: of the sampler.
          guidance_scale: 1 is none.
          stepper: integrator, `DPMSolver` by default; `UniPC` on the timesteps that Wan's sampler visits.
          shift: moves the sampler's timesteps towards noise; for sizes larger than those of training.
          seed: the same seed gives the same video on any number of devices.

        Returns:
          uint8 frames `t h w 3`, with a leading batch axis if `prompt` is a sequence.

        Raises:
          ValueError: a size that the models do not take; the message names the nearest.
          PromptTooLong: names what would be cut.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given = (num_frames, height, width)
        frames, rows, columns = (d if g is None else g for g, d in zip(given, self.size, strict=True))
        stepper = stepper or DPMSolver()
        convention = "unipc" if isinstance(stepper, UniPC) else "even"
        options = SamplingOptions(
            grid=TimeGrid(num_steps=steps, shift=shift, convention=convention),
            stepper=stepper,
            guidance_scale=guidance_scale,
        )
        with jax.set_mesh(self.mesh):
            videos = generate(
                self.model,
                self.vae,
                prompts,
                size=(frames, rows, columns),
                seeds=range(seed, seed + len(prompts)),
                negative_prompt=negative_prompt,
                options=options,
            )
        return videos[0] if isinstance(prompt, str) else videos


def load(path: pathlib.Path | str, *, mesh: Mesh | None = None) -> Pipeline:
    """A pipeline from the workdir of a text-to-video training run.

    Args:
      mesh: where to lay the weights; by default all devices, each with a copy.

    Raises:
      FileNotFoundError: no training run there, or it has no VAE.
      ValueError: the run trained something else.
    """
    mesh = MeshOptions().build() if mesh is None else mesh
    experiment, _, model = load_trained(path, mesh)
    if not isinstance(model, TextToVideo):
        raise ValueError(
            f"{path} is a run of kind {experiment.task.kind!r}; "
            "give one of kind 'text_to_video' (experiments/dit)"
        )
    vae = load_vae(path)
    data = experiment.data
    return Pipeline(
        model,
        jax.device_put(vae, shardings(vae, mesh)),
        size=(data.num_frames, data.height, data.width),
        fps=data.fps,
        mesh=mesh,
    )
