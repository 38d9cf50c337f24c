"""Prompt features from a T5 encoder, cached on disk."""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from vidgen.ckpt.tensor_files import TensorFiles, TensorSpec, WeightsError, write_tensors
from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.core.streams import Stream
from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.tokenizer import PromptTokenizer
from vidgen.parallel import processes
from vidgen.parallel.rules import constrain

__all__ = ["FeatureCache", "T5Prompts", "digest"]

_log = get_logger(__name__)

_SAMPLED = 2**16
"""Bytes hashed at the beginning and at the end of a large file."""


class T5Prompts:
    """`PromptEncoder` with features as Wan expects them: zeros beyond the prompt, and no mask.

    The encoder is loaded at the first prompt that the cache lacks.
    """

    def __init__(
        self,
        load: Callable[[], T5Encoder],
        tokenizer: PromptTokenizer,
        *,
        cache: "FeatureCache | None" = None,
        mesh: Mesh | None = None,
        batch_size: int = 8,
    ):
        """Stores the arguments; loads nothing.

        Args:
          load: returns the encoder.
          cache: cache of the features; None disables caching.
          mesh: mesh that the encoder is sharded over; None is one device. If it spans several processes, all
            of them must pass the same prompts.
          batch_size: prompts per batch; smaller batches are padded to this size, except single prompts.
        """
        self.tokenizer = tokenizer
        self._load = load
        self._encoder: T5Encoder | None = None
        self._cache = cache
        self._mesh = mesh
        self._batch_size = batch_size

    def __call__(self, prompts: Sequence[str]) -> Stream:
        return Stream(jax.numpy.asarray(self.features(prompts)))

    def features(self, prompts: Sequence[str]) -> Float[np.ndarray, "b l e"]:
        """Features of the prompts, in the encoder's compute dtype; zeros beyond each prompt."""
        if not prompts:
            raise UserError("found no prompt to encode: give at least one")
        tokens, mask = self.tokenizer(prompts)
        prompt_ids = [ids[used] for ids, used in zip(tokens, mask, strict=True)]
        cached = {_key(ids): self._cache.get(_key(ids)) if self._cache else None for ids in prompt_ids}
        missing = self._missing(
            [key for key in cached if cached[key] is None], [_key(ids) for ids in prompt_ids]
        )
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            for index, features in zip(batch, self._encode(tokens[batch], mask[batch]), strict=True):
                found = np.ascontiguousarray(features[: len(prompt_ids[index])])
                cached[_key(prompt_ids[index])] = found
                if self._cache:
                    self._cache.put(_key(prompt_ids[index]), found)
        first = cached[_key(prompt_ids[0])]
        assert first is not None
        out = np.zeros((*tokens.shape, first.shape[-1]), first.dtype)
        for padded, ids in zip(out, prompt_ids, strict=True):
            padded[: len(ids)] = cached[_key(ids)]
        return out

    def _missing(self, unknown: Sequence[str], keys: Sequence[str]) -> list[int]:
        """First index in `keys` of each key to encode, equal on all processes of the mesh.

        Processes encode together, but their caches may differ: each may read a cache that is being written,
        or a separate one. A key that is missing on any process is encoded on all of them.
        """
        is_missing = np.array([key in unknown for key in keys])
        if self._mesh is not None and processes.is_shared(self._mesh):
            is_missing = processes.anywhere(is_missing)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return sorted({first[key] for key, missing in zip(keys, is_missing, strict=True) if missing})

    def _encode(
        self, tokens: Int[np.ndarray, "b l"], mask: Bool[np.ndarray, "b l"]
    ) -> Float[np.ndarray, "b l e"]:
        if self._encoder is None:
            self._encoder = self._load()
        size = self._encoder.config.vocab_size
        if tokens.max() >= size:
            raise UserError(
                f"the tokenizer produced token id {tokens.max()}, but the text encoder has only {size} "
                "embeddings: take tokenizer and text encoder from the same checkpoint"
            )
        count = len(tokens)
        if count > 1:
            padding = ((0, self._batch_size - count), (0, 0))
            tokens, mask = np.pad(tokens, padding, mode="edge"), np.pad(mask, padding, mode="edge")
        with jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext():
            return np.asarray(_encode(self._encoder, tokens, mask))[:count]


class FeatureCache:
    """Folder of prompt features, one file per prompt; several processes may use it at the same time."""

    def __init__(self, folder: pathlib.Path | str, encoder: str):
        """Sets the folder, which the first `put` creates.

        Args:
          encoder: `digest` of the encoder; features of other encoders are ignored.
        """
        self._folder = pathlib.Path(folder) / encoder[:16]

    def get(self, key: str) -> Float[np.ndarray, "l e"] | None:
        """Features stored under `key`; None if the file is missing or damaged."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return TensorFiles(path).read("features")
        except (WeightsError, KeyError) as error:
            _log.warning("%s is damaged (%s): the prompt is encoded again", path, error)
            return None

    def put(self, key: str, features: Float[np.ndarray, "l e"]) -> None:
        """Stores features under `key`; the file is written atomically."""
        spec = TensorSpec(features.shape, features.dtype)
        write_tensors(self._path(key), {"features": spec}, [features])

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / key[:2] / f"{key}.safetensors"


def digest(paths: Iterable[pathlib.Path], *more: str) -> str:
    """SHA-256 of files and strings; of files over 128 KiB, only size, first and last 64 KiB are hashed."""
    sha256 = hashlib.sha256("\0".join(more).encode())
    for path in sorted(paths):
        size = path.stat().st_size
        sha256.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            sha256.update(file.read(_SAMPLED))
            if size > _SAMPLED:
                file.seek(max(_SAMPLED, size - _SAMPLED))
                sha256.update(file.read(_SAMPLED))
    return sha256.hexdigest()


def _key(tokens: Int[np.ndarray, "l"]) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


@jax.jit
def _encode(encoder: T5Encoder, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l e"]:
    # Replicated, so that each process can fetch the features.
    return constrain(encoder(tokens, mask), None, None, None)
