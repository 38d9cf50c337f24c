"""Evaluators of a training run, chosen by its task: previews on held-out clips."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from vidgen.data.folder import FolderData
from vidgen.data.latents_data import clips_of
from vidgen.data.source import BrokenClip, ClipSource
from vidgen.data.sprites.source import SpritesData
from vidgen.evals.previews import ReconstructionPreview, SamplePreview
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.model import VideoVAE
from vidgen.pipeline import Pipeline
from vidgen.train.evaluator import Evaluator
from vidgen.train.experiment import Experiment
from vidgen.train.text_to_video_task import TextToVideoTask

__all__ = ["evaluators", "heldout_source"]

NUM_CLIPS = 9


def evaluators(experiment: Experiment, *, mesh: Mesh) -> Sequence[Evaluator]:
    """Evaluators that write previews on held-out clips every `run.eval_every` steps.

    Args:
      mesh: the run's mesh.
    """
    data, every = experiment.data, experiment.run.eval_every
    clips = _first_clips(heldout_source(experiment), NUM_CLIPS)
    if isinstance(experiment.task, TextToVideoTask):
        return _samples(experiment, experiment.task, clips, mesh)
    videos = np.stack([clip["video"] for clip in clips])
    return [ReconstructionPreview(clips=videos, every=every, fps=data.fps)]


def _samples(
    experiment: Experiment, task: TextToVideoTask, clips: Sequence[dict], mesh: Mesh
) -> Sequence[Evaluator]:
    """Previews sampled from the clips' captions, and from their first frames if the model takes images."""
    limit = task.text.max_bytes if task.text_encoder is None else None
    clips = [clip for clip in clips if limit is None or len(clip["caption"].encode()) <= limit]
    if not clips:
        return []
    prompts = tuple(clip["caption"] for clip in clips)
    size, fps = clips[0]["video"].shape[:3], experiment.data.fps

    def sample(model: TextToVideo, vae: VideoVAE, prompts: Sequence[str]) -> np.ndarray:
        pipe = Pipeline(
            model, vae, task.all_conditioners, size=size, fps=fps, mesh=mesh, options=task.sampling_options()
        )
        if not task.conditioners:
            return pipe(prompts)
        videos = [
            pipe(prompt, image=clip["video"][0], seed=seed)
            for seed, (prompt, clip) in enumerate(zip(prompts, clips, strict=True))
        ]
        return np.stack(videos)

    return [SamplePreview(prompts=prompts, sample=sample, every=experiment.run.eval_every, fps=fps)]


def heldout_source(experiment: Experiment) -> ClipSource:
    """The experiment's held-out clips; its training clips if the data has no held-out split."""
    data = clips_of(experiment.data)
    has_heldout = isinstance(data, SpritesData) or (isinstance(data, FolderData) and data.split == "train")
    return (dataclasses.replace(data, split="heldout") if has_heldout else data).source()


def _first_clips(source: ClipSource, count: int) -> list[dict]:
    clips = []
    for index in range(len(source)):
        try:
            clips.append(source[index])
        except BrokenClip:
            continue  # `Loader` reports broken clips
        if len(clips) == count:
            break
    return clips
