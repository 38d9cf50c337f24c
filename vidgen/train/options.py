"""Options of a training run that do not depend on what is trained."""

import dataclasses

from vidgen.core.errors import UserError
from vidgen.train.power_law import PowerLaw

__all__ = ["RunOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long, how much at a time, and how often what happens; all intervals count steps.

    Attributes:
      num_steps: when the run is complete.
      batch_size: clips per step, over all devices and processes; of packed clips (`LatentsData`), rows.
      seed: of the weights, the noise and the order of the clips.
      init_from: workdir of a run of the same model, whose averaged weights a new run starts from; a VAE's may
        have been trained with or without an adversary, in whole or in part, or be a VAE alone, such as Wan's
        in diffusers' layout.
      log_every: between lines of metrics.jsonl; each is the mean over the steps since the last.
      checkpoint_every: between checkpoints.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this stay too; None keeps the newest only.
      ema_decay: of the averaged weights.
      power_law: further averages, snapshots of which give weights averaged over any length afterwards
        (`vidgen average`); None keeps none.
      grad_clip: largest global norm of the gradient, or None.
      grad_accumulation: micro-batches per step.
      num_threads: that decode clips, per process.
    """

    num_steps: int = 100_000
    batch_size: int = 8
    seed: int = 0
    init_from: str | None = None
    log_every: int = 50
    eval_every: int = 2000
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    ema_decay: float = 0.999
    power_law: PowerLaw | None = None
    grad_clip: float | None = 1.0
    grad_accumulation: int = 1
    num_threads: int = 2

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "checkpoint_every", "keep", "grad_accumulation"):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name} is {getattr(self, name)}: it must be at least 1")
        if self.batch_size % self.grad_accumulation:
            raise UserError(
                f"run.grad_accumulation is {self.grad_accumulation}, which does not divide "
                f"run.batch_size {self.batch_size}"
            )
