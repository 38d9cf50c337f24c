"""Options of a training run that do not depend on the task."""

import dataclasses
from typing import Annotated

from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.train.power_law import PowerLaw

__all__ = ["RunOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Length, batch size and intervals of a run; all intervals count steps.

    Attributes:
      num_steps: step after which the run is complete.
      schedule_steps: length of the learning-rate schedule; None is `num_steps` when the run begins, and stays
        so when the run resumes with another `num_steps`.
      batch_size: clips per step, over all devices and processes; for packed clips (`LatentsData`), packed
        rows.
      seed: seed of the weights, the noise and the order of the clips.
      init_from: workdir of a run of the same model, whose averaged weights a new run starts from. A VAE may
        have been trained with or without an adversary, completely or only its decoder; the path may also be a
        VAE without a run, such as Wan's in diffusers' layout. LoRA matrices of the other run are merged. A
        run with `task.lora` reads these weights whenever it starts, is sampled from or exported.
      log_every: steps between lines of metrics.jsonl; each is the mean over the steps since the last.
      eval_every: steps between previews on held-out clips; 0 is only at the end.
      checkpoint_every: steps between checkpoints.
      keep: number of newest checkpoints that stay.
      keep_every: checkpoints at multiples of this stay too; None keeps the newest only.
      ema_decay: decay of the averaged weights per step.
      power_law: further averages, whose snapshots give weights averaged over any length afterwards (`vidgen
        average`); None computes none.
      grad_clip: largest global norm of the gradient, or None.
      grad_accumulation: micro-batches per step.
      stop_after_nonfinite: a step whose loss or gradient is not finite is skipped and counted; the run stops
        after this many in a row.
      skip_steps: pairs of a first and a last step to skip: their batches are read, but not trained on.
      num_threads: threads that decode clips, per process.
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
                    f"run.skip_steps: found [{first}, {last}], expected a first step of at least 1 "
                    "and a last step that is not before it"
                )

    @property
    def schedule_length(self) -> int:
        """Steps of the learning-rate schedule."""
        return self.num_steps if self.schedule_steps is None else self.schedule_steps

    def skips(self, step: int) -> bool:
        """Whether `step` is skipped."""
        return any(first <= step <= last for first, last in self.skip_steps)
