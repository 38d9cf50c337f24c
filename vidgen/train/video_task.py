"""Base of tasks: what most of them answer alike."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError
from vidgen.core.typing import Array, Float, Metrics
from vidgen.data.buckets import training_clips
from vidgen.data.loader import Loader
from vidgen.models.video_vae.config import VAEConfig
from vidgen.nn.lora import LoRAOptions
from vidgen.train.batch_spec import BatchSpec, empty_batch, spec_of
from vidgen.train.check_sizes import check_videos
from vidgen.train.evaluator import Evaluator, Previews
from vidgen.train.options import RunOptions
from vidgen.train.task import Frozen, Phase
from vidgen.train.text_features import TextFeatures

__all__ = ["VideoTask", "Videos"]


class Videos(NamedTuple):
    """A batch of clips of one size, uint8 `b t h w 3`, on the host (NumPy) or on the device."""

    video: Any


class VideoTask:
    """A task on videos of one size per batch that depends on no other run.

    A subclass is a frozen dataclass that defines `kind`, `network`, `build` and `loss`, and overrides what
    differs. `vidgen.train.task.ExperimentTask` documents the methods.
    """

    text_encoder: TextFeatures | None = None
    lora: LoRAOptions | None = None
    scores: ClassVar[Literal["reconstructions", "prompts", "none"]] = "none"

    def loss(self, context: Any) -> tuple[Float[Array, ""], Metrics]:
        raise NotImplementedError

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(loss=self.loss),)

    def inference_model(self, model: Any) -> Any:
        return model

    def frozen(self) -> dict[str, Frozen]:
        return {}

    def vae_config(self) -> VAEConfig:
        raise UserError(f"a task of kind {getattr(self, 'kind', type(self).__name__)!r} has no VAE")

    def in_workdir(self, workdir: pathlib.Path) -> Any:
        return self

    def prepare(self, workdir: pathlib.Path) -> Any:
        return self

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> Any:
        return self

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises UserError for a clip size that the model does not support."""

    def check(self, data: Any, run: RunOptions, mesh: Mesh) -> None:
        if data.packing is not None:
            raise ConfigError("config.data.kind is latents, on which only a task of text_to_video is trained")
        check_videos(data, run, mesh, self.check_size)

    def loader(self, data: Any) -> Callable[..., Any]:
        return functools.partial(Loader, training_clips(data))

    def evaluators(self, previews: Previews) -> Sequence[Evaluator]:
        return ()

    def arrays(self, batch: Mapping[str, Any]) -> Any:
        return Videos(video=batch["video"])

    def batch_spec(self, data: Any, batch_size: int) -> BatchSpec:
        return spec_of(self.arrays(empty_batch(data)), batch_size)

    def finish(
        self,
        model: nnx.Module,
        *,
        step: int,
        workdir: pathlib.Path,
        open_clips: Callable[[], Any] | None,
        mesh: Mesh,
    ) -> None:
        """Writes nothing: the checkpoints hold what sampling needs."""
