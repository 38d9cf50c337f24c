"""Initializes a run from the weights of another, which may have trained another module."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vidgen.core.logging import get_logger
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree
from vidgen.train.state import TrainState
from vidgen.train.weights_source import find_weights, is_lora

__all__ = ["init_from_run"]

_log = get_logger(__name__)


def init_from_run(workdir: pathlib.Path | str, state: TrainState, new: Collection[str] = ()) -> TrainState:
    """`state` with another run's averaged weights as parameters and EMA, and with its buffers.

    New LoRA matrices keep their initial values, whatever the run starts from.

    Args:
      workdir: the other run, or weights without a run: see `vidgen.train.weights_source.find_weights`.
      new: names of submodules that keep their initial weights if the other run lacks them.

    Raises:
      CheckpointError, WeightsError: as in `find_weights`.
    """
    names = named_leaves(state.params) | named_leaves(state.buffers)
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in names.items()
        if not is_lora(name)
    }
    if not wanted:  # A LoRA, whose base is no part of the state (`vidgen.train.base`).
        return state
    found = find_weights(workdir, wanted, new)
    fresh = sorted({name.partition(".")[0] for name in wanted.keys() - found.arrays.keys()})
    _log.info("weights initialized from %s%s%s", workdir, found.origin, f"; new: {fresh}" if fresh else "")
    params = _replaced(state.params, found.arrays)
    return dataclasses.replace(
        state,
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        buffers=_replaced(state.buffers, found.arrays),
    )


def _replaced(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    leaves = [arrays.get(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
