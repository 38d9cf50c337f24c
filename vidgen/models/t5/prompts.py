"""Features of prompts by a T5 encoder, kept on disk."""

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
from vidgen.core.typing import Array, Bool, Float, Int
from vidgen.models.condition import Condition
from vidgen.models.t5.model import T5Encoder
from vidgen.models.t5.tokenizer import PromptTokenizer
from vidgen.parallel import processes
from vidgen.parallel.rules import constrain

__all__ = ["FeatureCache", "T5Prompts", "digest"]

_log = get_logger(__name__)

_SAMPLED = 2**16
"""Bytes of the beginning and of the end of a large file that stand for all of it."""


class T5Prompts:
    """Prompts to features as Wan takes them: zeros beyond the prompt, and no mask. A `PromptEncoder`.

    The encoder is loaded when the first prompt needs it, so that none is where the cache has them all.
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
        """Loads nothing yet.

        Args:
          load: gives the encoder.
          cache: where features are kept; None keeps none.
          mesh: over which the encoder is laid; None is one device. Over several processes, all of them must
            ask for the same prompts.
          batch_size: prompts at a time; fewer are filled up to it, except for single ones.
        """
        self.tokenizer = tokenizer
        self._load = load
        self._encoder: T5Encoder | None = None
        self._cache = cache
        self._mesh = mesh
        self._batch_size = batch_size

    def __call__(self, prompts: Sequence[str]) -> Condition:
        return Condition(jax.numpy.asarray(self.features(prompts)))

    def features(self, prompts: Sequence[str]) -> Float[np.ndarray, "b l e"]:
        """Features of the prompts, in the encoder's compute dtype; zeros beyond each."""
        tokens, mask = self.tokenizer(prompts)
        rows = [row[used] for row, used in zip(tokens, mask, strict=True)]
        known = {_key(row): self._cache.get(_key(row)) if self._cache else None for row in rows}
        where = self._missing([key for key in known if known[key] is None], [_key(row) for row in rows])
        for start in range(0, len(where), self._batch_size):
            chunk = where[start : start + self._batch_size]
            for index, features in zip(chunk, self._encode(tokens[chunk], mask[chunk]), strict=True):
                found = np.ascontiguousarray(features[: len(rows[index])])
                known[_key(rows[index])] = found
                if self._cache:
                    self._cache.put(_key(rows[index]), found)
        first = known[_key(rows[0])]
        assert first is not None
        out = np.zeros((*tokens.shape, first.shape[-1]), first.dtype)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = known[_key(ids)]
        return out

    def _missing(self, unknown: Sequence[str], keys: Sequence[str]) -> list[int]:
        """Where in `keys` each stands first that must be encoded, the same on all processes of the mesh.

        They encode together, while each finds another part of a cache that is being written, or has a cache
        of its own. What one of them lacks, all encode.
        """
        lacking = np.array([key in unknown for key in keys])
        if self._mesh is not None and processes.is_shared(self._mesh):
            lacking = processes.anywhere(lacking)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return sorted({first[key] for key, lacks in zip(keys, lacking, strict=True) if lacks})

    def _encode(
        self, tokens: Int[np.ndarray, "b l"], mask: Bool[np.ndarray, "b l"]
    ) -> Float[np.ndarray, "b l e"]:
        if self._encoder is None:
            self._encoder = self._load()
        size = self._encoder.config.vocab_size
        if tokens.max() >= size:
            raise UserError(
                f"the tokenizer gives token {tokens.max()}, the text encoder has {size}: they do not belong "
                "together; take both from one checkpoint"
            )
        count = len(tokens)
        if count > 1:
            fill = ((0, self._batch_size - count), (0, 0))
            tokens, mask = np.pad(tokens, fill, mode="edge"), np.pad(mask, fill, mode="edge")
        with jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext():
            return np.asarray(_encode(self._encoder, tokens, mask))[:count]


class FeatureCache:
    """Features in a folder, a file for each prompt; several processes may use it at once."""

    def __init__(self, folder: pathlib.Path | str, encoder: str):
        """Names the folder, which is made when the first features are put into it.

        Args:
          encoder: what made the features, as `digest` gives it; other encoders' are not found.
        """
        self._folder = pathlib.Path(folder) / encoder[:16]

    def get(self, key: str) -> Float[np.ndarray, "l e"] | None:
        """The features under `key`, or None; a damaged file counts as none."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return TensorFiles(path).read("features")
        except (WeightsError, KeyError) as error:
            _log.warning("%s is damaged (%s): the prompt is encoded again", path, error)
            return None

    def put(self, key: str, features: Float[np.ndarray, "l e"]) -> None:
        """Keeps features; the file appears whole."""
        spec = TensorSpec(features.shape, features.dtype)
        write_tensors(self._path(key), {"features": spec}, [features])

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / key[:2] / f"{key}.safetensors"


def digest(paths: Iterable[pathlib.Path], *more: str) -> str:
    """A hash of files and strings. Of files over 128 kB it looks at the size, the beginning and the end."""
    whole = hashlib.sha256("\0".join(more).encode())
    for path in sorted(paths):
        size = path.stat().st_size
        whole.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            whole.update(file.read(_SAMPLED))
            if size > _SAMPLED:
                file.seek(max(_SAMPLED, size - _SAMPLED))
                whole.update(file.read(_SAMPLED))
    return whole.hexdigest()


def _key(tokens: Int[np.ndarray, "l"]) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


@jax.jit
def _encode(encoder: T5Encoder, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l e"]:
    # Replicated, so that each process can read it.
    return constrain(encoder(tokens, mask), None, None, None)
