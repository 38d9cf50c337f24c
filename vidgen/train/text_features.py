"""Caption features from a text encoder that is not trained."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from vidgen.core.typing import Float
from vidgen.models.t5 import transformers_folder
from vidgen.models.t5.prompts import FeatureCache, T5Prompts, digest
from vidgen.models.t5.tokenizer import PromptTokenizer
from vidgen.parallel.mesh import MeshOptions

__all__ = ["TextFeatures"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """A T5 or UMT5 encoder with its tokenizer.

    Attributes:
      path: folder with `text_encoder` and `tokenizer`: a Wan checkpoint for diffusers.
      cache: folder that caches the features of each caption, so that the encoder computes them once; if all
        captions are cached it is not even loaded. None disables the cache.
      max_tokens: tokens per caption.
      dtype: dtype of the encoder's weights and of the features.
    """

    path: str
    cache: str | None = None
    max_tokens: int = 512
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def features(self, captions: Sequence[str]) -> Float[np.ndarray, "b l e"]:
        """Features of captions, zero beyond the end of each.

        Raises:
          FileNotFoundError: a part of the encoder is missing.
        """
        # On the devices of this process only: each process has different captions.
        return _opened(self, MeshOptions(data=1, fsdp=-1).build(jax.local_devices())).features(captions)

    def prompts(self, mesh: Mesh) -> T5Prompts:
        """The encoder; its weights are placed on `mesh` when a caption is not in the cache."""
        return _opened(self, mesh)


@functools.lru_cache(maxsize=2)
def _opened(options: TextFeatures, mesh: Mesh) -> T5Prompts:
    encoder, tokenizer = pathlib.Path(options.path) / "text_encoder", pathlib.Path(options.path) / "tokenizer"
    transformers_folder.read_config(encoder)  # Finds missing files before the first prompt.
    cache = None
    if options.cache is not None:
        files = [*encoder.glob("*.json"), *encoder.glob("*.safetensors"), *tokenizer.glob("*.*")]
        cache = FeatureCache(options.cache, digest(files, options.dtype))
    load = functools.partial(transformers_folder.load_transformers, encoder, mesh, dtype=options.dtype)
    return T5Prompts(load, PromptTokenizer(tokenizer, max_tokens=options.max_tokens), cache=cache, mesh=mesh)
