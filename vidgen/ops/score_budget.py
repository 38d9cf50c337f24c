"""How much memory attention's scores may take, and what is said when no kernel takes a call."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.core.typing import Array
from vidgen.parallel.rules import partition_spec

__all__ = ["SCORE_BYTES", "ScoresTooLarge", "check_scores", "heads_here", "refusal", "report_fallback"]

_log = get_logger(__name__)

SCORE_BYTES = 2**32
"""Scores that are in the memory of one device at once, at most, where no kernel takes a call."""

_WARNED = 2**28
"""Scores of so many bytes cost noticeable memory and time: that no kernel takes them is then a warning."""


_REMEDY = (
    '. Use the implementation "auto", bfloat16, for which there are kernels, fewer clips or tokens on a '
    "device (a mesh with more of `context` or `tensor`), or smaller clips"
)


class ScoresTooLarge(UserError):
    """No implementation computes a call of attention within `SCORE_BYTES`; the message says what to do."""


def heads_here(query: Array) -> tuple[int, int]:
    """Heads of all clips, and queries, that one device attends with, of `b s n k`.

    Inside `shard_map` and without a mesh these are all of `query`; otherwise as `partition_spec` cuts them.
    """
    mesh, shape = jax.sharding.get_abstract_mesh(), query.shape
    if not mesh.empty and not mesh.manual_axes:
        spec = partition_spec(("batch", "tokens", "heads", None), shape, mesh)
        shape = NamedSharding(mesh, spec).shard_shape(shape)
    return shape[0] * shape[2], shape[1]


def check_scores(implementation: str, num_bytes: int) -> None:
    """Raises ScoresTooLarge where an implementation has more bytes of scores in memory than there may be."""
    if num_bytes > SCORE_BYTES:
        raise ScoresTooLarge(
            f"attention: {implementation} would have {_gib(num_bytes)} of scores in the memory of a device, "
            f"of {_gib(SCORE_BYTES)} that it may (vidgen.ops.score_budget.SCORE_BYTES){_REMEDY}"
        )


def report_fallback(
    query: Any, key: Any, chosen: str, num_bytes: int, reasons: Mapping[str, Exception]
) -> None:
    """Logs once, for each shape, what is used in the place of the implementations that refused."""
    if not reasons:
        return
    _log_once(
        logging.WARNING if chosen == "blocks" or num_bytes >= _WARNED else logging.INFO,
        f"{_shapes(query, key)}: {chosen}, with {_gib(num_bytes)} of scores in the memory of a device, for "
        f"{_listed(reasons)}",
    )


def refusal(query: Any, key: Any, reasons: Mapping[str, Exception]) -> ScoresTooLarge:
    """The error where every implementation refused."""
    return ScoresTooLarge(f"{_shapes(query, key)}: no implementation takes it: {_listed(reasons)}{_REMEDY}")


@functools.lru_cache(maxsize=1024)
def _log_once(level: int, message: str) -> None:
    _log.log(level, message)


def _shapes(query: Any, key: Any) -> str:
    b, s, n, k = query.shape
    return f"attention of {b} x {s} queries to {key.shape[1]} keys, {n} heads of {k} channels, {query.dtype}"


def _listed(reasons: Mapping[str, Exception]) -> str:
    texts = {
        name: str(reason).removeprefix("attention: ").removesuffix(_REMEDY)
        for name, reason in reasons.items()
    }
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**26 else f"{math.ceil(num_bytes / 2**20)} MiB"
