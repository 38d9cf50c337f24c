"""Memory budget of attention scores, and the log messages and errors for calls without a kernel."""

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
"""Most bytes of scores in one device's memory at a time, for a call that no kernel supports."""

_WARNED = 2**28
"""Bytes of scores that cost noticeable memory and time: from here on a fallback is logged as a warning."""


_REMEDY = (
    '. Use the implementation "auto", bfloat16, for which there are kernels, fewer clips or tokens on a '
    "device (a mesh with more of `context` or `tensor`), or smaller clips"
)


class ScoresTooLarge(UserError):
    """No implementation computes an attention call within `SCORE_BYTES`; the message names remedies."""


def heads_here(query: Array) -> tuple[int, int]:
    """Clips x heads, and queries, of one device's shard of `query`, `b s n k`.

    Inside `shard_map` and without a mesh that is all of `query`; otherwise `partition_spec` shards it.
    """
    mesh, shape = jax.sharding.get_abstract_mesh(), query.shape
    if not mesh.empty and not mesh.manual_axes:
        spec = partition_spec(("batch", "tokens", "heads", None), shape, mesh)
        shape = NamedSharding(mesh, spec).shard_shape(shape)
    return shape[0] * shape[2], shape[1]


def check_scores(implementation: str, num_bytes: int) -> None:
    """Raises ScoresTooLarge if `num_bytes` of scores exceed `SCORE_BYTES`."""
    if num_bytes > SCORE_BYTES:
        raise ScoresTooLarge(
            f"attention: {implementation} would have {_gib(num_bytes)} of scores in the memory of a device; "
            f"the limit is {_gib(SCORE_BYTES)} (vidgen.ops.score_budget.SCORE_BYTES){_REMEDY}"
        )


def report_fallback(
    query: Any, key: Any, chosen: str, num_bytes: int, reasons: Mapping[str, Exception]
) -> None:
    """Logs, once per shape, the chosen implementation and why the preferred ones do not support the call."""
    if not reasons:
        return
    _log_once(
        logging.WARNING if chosen == "blocks" or num_bytes >= _WARNED else logging.INFO,
        f"{_shapes(query, key)}: {chosen}, with {_gib(num_bytes)} of scores in the memory of a device, for "
        f"{_listed(reasons)}",
    )


def refusal(query: Any, key: Any, reasons: Mapping[str, Exception]) -> ScoresTooLarge:
    """The error to raise if no implementation supports the call, with each one's reason."""
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
