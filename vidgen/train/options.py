"""Options of a training run that do not depend on what is trained."""

import dataclasses
from typing import Annotated

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.train.power_law import PowerLaw

__all__ = ["RunOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long, how much at a time, and how often what happens; all intervals count steps.

    Attributes:
      num_steps: when the run is complete.
      schedule_steps: over which the learning rate rises and falls; None is `num_steps` when the run begins,
        and stays that when a run goes on with another `num_steps`.
      batch_size: clips per step, over all devices and processes; of packed clips (`LatentsData`), rows.
      seed: of the weights, the noise and the order of the clips.
      init_from: workdir of a run of the same model, whose averaged weights a new run starts from; a VAE's may
        have been trained with or without an adversary, in whole or in part, or be a VAE alone, such as Wan's
        in diffusers' layout. Of a run of LoRA the updates are merged.
      log_every: between lines of metrics.jsonl; each is the mean over the steps since the last.
      eval_every: between previews on held-out clips; 0 is only at the end.
      checkpoint_every: between checkpoints.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this stay too; None keeps the newest only.
      ema_decay: of the averaged weights.
      power_law: further averages, snapshots of which give weights averaged over any length afterwards
        (`vidgen average`); None keeps none.
      grad_clip: largest global norm of the gradient, or None.
      grad_accumulation: micro-batches per step.
      stop_after_nonfinite: a step whose loss or gradient is not finite is skipped and counted; after so many
        in a row the run stops.
      skip_steps: pairs of a first and a last step that are left out: their batches are taken, not trained on.
      num_threads: that decode clips, per process.
    """

    num_steps: Annotated[int, limits.STEPS] = 100_000
    schedule_steps: Annotated[int, limits.STEPS] | None = None
    batch_size: Annotated[int, limits.BATCH_SIZE] = 8
    seed: Annotated[int, limits.SEED] = 0
    init_from: str | None = None
    log_every: Annotated[int, limits.STEPS] = 50
    eval_every: Annotated[int, limits.STEP] = 2000
    checkpoint_every: Annotated[int, limits.STEPS] = 1000
    keep: Annotated[int, limits.COUNT] = 2
    keep_every: Annotated[int, limits.STEPS] | None = None
    ema_decay: Annotated[float, limits.DECAY] = 0.999
    power_law: PowerLaw | None = None
    grad_clip: Annotated[float, limits.POSITIVE] | None = 1.0
    grad_accumulation: Annotated[int, limits.COUNT] = 1
    stop_after_nonfinite: Annotated[int, limits.STEPS] = 5
    skip_steps: tuple[tuple[int, int], ...] = ()
    num_threads: Annotated[int, limits.NUM_THREADS] = 2

    def __post_init__(self):
        limits.check_fields(self, "run")
        if self.batch_size % self.grad_accumulation:
            raise UserError(
                f"run.grad_accumulation is {self.grad_accumulation}, which does not divide "
                f"run.batch_size {self.batch_size}"
            )
        for first, last in self.skip_steps:
            if not 1 <= first <= last:
                raise UserError(
                    f"run.skip_steps: found [{first}, {last}], expected a first step from 1 and a last one "
                    "that is not before it"
                )

    @property
    def schedule_length(self) -> int:
        """Steps of the schedule of the learning rate."""
        return self.num_steps if self.schedule_steps is None else self.schedule_steps

    def skips(self, step: int) -> bool:
        """Whether `step` is left out."""
        return any(first <= step <= last for first, last in self.skip_steps)
