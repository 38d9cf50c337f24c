"""Evaluators of a training run, chosen by its task: previews on held-out clips."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from vidgen.data.source import BrokenClip, ClipSource
from vidgen.evals.previews import ReconstructionPreview, SamplePreview
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.model import VideoVAE
from vidgen.pipeline import Pipeline
from vidgen.train.evaluator import Evaluator
from vidgen.train.experiment import Experiment
from vidgen.train.text_to_video_task import TextToVideoTask

__all__ = ["evaluators"]

NUM_CLIPS = 9


def evaluators(experiment: Experiment, *, mesh: Mesh) -> Sequence[Evaluator]:
    """Evaluators of the experiment's task, called every `run.eval_every` steps.

    Args:
      mesh: the run's mesh.
    """
    source = experiment.data.clips.heldout().source()
    clips = _first_clips(source, NUM_CLIPS)
    return experiment.task.evaluators(
        RunPreviews(clips=clips, every=experiment.run.eval_every, fps=experiment.data.fps, mesh=mesh)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPreviews:
    """Previews on held-out clips (fills `vidgen.train.evaluator.Previews`)."""

    clips: Sequence[dict]
    every: int
    fps: float
    mesh: Mesh

    def reconstructions(self) -> Sequence[Evaluator]:
        videos = np.stack([clip["video"] for clip in self.clips])
        return [ReconstructionPreview(clips=videos, every=self.every, fps=self.fps)]

    def samples(self, task: TextToVideoTask) -> Sequence[Evaluator]:
        """Samples from the clips' captions, and from their first frames if the model takes images."""
        limit = task.text.max_bytes if task.text_encoder is None else None
        clips = [clip for clip in self.clips if limit is None or len(clip["caption"].encode()) <= limit]
        if not clips:
            return []
        prompts = tuple(clip["caption"] for clip in clips)
        size = clips[0]["video"].shape[:3]

        def sample(model: TextToVideo, vae: VideoVAE, prompts: Sequence[str]) -> np.ndarray:
            pipe = Pipeline(
                model,
                vae,
                task.all_conditioners,
                size=size,
                fps=self.fps,
                mesh=self.mesh,
                options=task.sampling_options(),
            )
            if not any("image" in conditioner.fields for conditioner in task.conditioners):
                return pipe(prompts)
            videos = [
                pipe(prompt, image=clip["video"][0], seed=seed)
                for seed, (prompt, clip) in enumerate(zip(prompts, clips, strict=True))
            ]
            return np.stack(videos)

        return [SamplePreview(prompts=prompts, sample=sample, every=self.every, fps=self.fps)]


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
