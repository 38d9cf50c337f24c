"""Initializes a run from the weights of another, which may have trained another module."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.core.logging import get_logger
from vidgen.core.paths import hub_remedy
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree
from vidgen.models.dit.diffusers_folder import is_transformer, load_arrays
from vidgen.nn.lora import ATTRIBUTE
from vidgen.train.experiment import load_experiment
from vidgen.train.state import TrainState
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import has_vae, load_vae

__all__ = ["init_from_run"]

_log = get_logger(__name__)


def init_from_run(
    workdir: pathlib.Path | str, state: TrainState, param_groups: Mapping[str, Any]
) -> TrainState:
    """`state` with another run's averaged weights as parameters and EMA, and with its buffers.

    Arrays are matched by name, whether either run trains them or not. One module may be a submodule of the
    other: a VAE can start from a VAE with a discriminator and the other way around, with the encoder trained
    or not.

    LoRA matrices of the other run are merged into their kernels.

    Args:
      workdir: workdir of the other run, whose newest checkpoint is read; or a VAE without a run, as
        `vidgen.train.vae_folder.load_vae` finds it, also Wan's in diffusers' layout; or a transformer in that
        layout (for a full checkpoint, its `transformer`) if the run trains a transformer.
      param_groups: names of submodules that keep their initial weights if the other run lacks them.

    Raises:
      CheckpointError: there is no checkpoint, or it is of another model; the message names the arrays that
        differ or have no counterpart here.
      WeightsError: a VAE's weights are damaged.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    wanted = named_leaves(state.params) | named_leaves(state.buffers)
    if directory.is_dir():
        source, arrays, suffix = _from_run(directory, wanted, param_groups)
    elif (transformer := _transformer(workdir)) is not None:
        source, arrays, suffix = _from_transformer(transformer, wanted)
    elif has_vae(workdir):
        source, arrays, suffix = _from_vae(workdir, wanted, param_groups)
    else:
        raise CheckpointError(
            f"{directory} is missing: expected the workdir of a training run, a VAE, or Wan's weights"
            f"{hub_remedy(workdir)}"
        )
    fresh = sorted({_part(name) for name in wanted.keys() - source.keys()})
    _log.info("weights initialized from %s%s%s", workdir, suffix, f"; new: {fresh}" if fresh else "")
    found = {name: arrays[checkpoint_name] for name, checkpoint_name in source.items()}
    # New LoRA matrices keep their initial values, whatever the run starts from.
    params = _replaced(state.params, found)
    return dataclasses.replace(
        state, params=params, ema=jax.tree.map(jnp.copy, params), buffers=_replaced(state.buffers, found)
    )


_ResolvedWeights = tuple[dict[str, str], dict[str, jax.Array], str]
"""Checkpoint name of each array, arrays by checkpoint name, and a suffix for the log message."""


def _from_run(
    directory: pathlib.Path, wanted: Mapping[str, Any], param_groups: Mapping[str, Any]
) -> _ResolvedWeights:
    with CheckpointManager(directory) as checkpoints:
        saved = checkpoints.shapes()
        weights = {name: saved[name] for name in saved if _is_weight(name)}
        source = _checkpoint_names(
            wanted, {name: x for name, x in weights.items() if not _is_lora(name)}, param_groups
        )
        abstract = {
            source[name]: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in wanted.items()
            if name in source
        }
        lora = {name: x for name, x in weights.items() if _is_lora(name)}
        _check_all_used(directory, weights, {*source.values(), *lora})
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        abstract |= {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
            for name, shape in lora.items()
        }
        step, arrays = checkpoints.restore_named(abstract)
    merged = ", its LoRA merged" if lora else ""
    return source, _merge_lora(directory.parent, arrays, lora), f" after step {step}{merged}"


def _check_all_used(directory: pathlib.Path, saved: Iterable[str], used: set[str]) -> None:
    """Checks that each submodule is used completely or not at all.

    An unused submodule is e.g. a discriminator, or the text encoder of another kind of run.
    """
    names = {name.partition(".")[2]: name for name in saved}
    parts = {name.partition(".")[2].partition(".")[0] for name in used}
    unused = sorted(name for name, checkpoint_name in names.items() if checkpoint_name not in used)
    incomplete = [name for name in unused if name.partition(".")[0] in parts]
    if incomplete:
        shown = "\n  ".join(incomplete[:20] + (["..."] if len(incomplete) > 20 else []))
        raise CheckpointError(
            f"{directory} is of another model: it has {len(incomplete)} arrays that this one does not. Use "
            f"the config that it was trained with\n  {shown}"
        )
    if unused:
        _log.info("unused parts of %s: %s", directory, sorted({name.partition(".")[0] for name in unused}))


def _merge_lora(
    workdir: pathlib.Path, arrays: dict[str, jax.Array], lora: Iterable[str]
) -> dict[str, jax.Array]:
    """The arrays, with the LoRA matrices that the run trained merged into their kernels."""
    ends = tuple(f".{ATTRIBUTE}.{side}" for side in ("down", "up"))
    linears = sorted({name.removesuffix(ends[0]) for name in lora if name.endswith(ends[0])})
    if not linears:
        return arrays
    scale = _lora_scale(workdir)
    kernels = {name.partition(".")[2]: name for name in arrays if not _is_lora(name)}
    for linear in linears:
        kernel = kernels[f"{linear.partition('.')[2]}.kernel"]
        down, up = (arrays[linear + end] for end in ends)
        merged = _add_lora(arrays[kernel], down, up, jnp.float32(scale))
        arrays[kernel] = jax.device_put(merged, arrays[kernel].sharding)
    return arrays


@jax.jit
def _add_lora(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: jax.Array) -> jax.Array:
    return kernel + scale * jnp.matmul(down, up, precision="highest").astype(kernel.dtype)


def _lora_scale(workdir: pathlib.Path) -> float:
    task = load_experiment(workdir).task
    lora = task.lora if isinstance(task, TextToVideoTask) else None
    if lora is None:
        raise CheckpointError(
            f"{workdir / 'config.json'} has no task.lora, but the checkpoints contain LoRA "
            "matrices, whose scale it defines: restore the file"
        )
    return lora.scale


def _from_vae(
    workdir: pathlib.Path | str, wanted: Mapping[str, Any], param_groups: Mapping[str, Any]
) -> _ResolvedWeights:
    vae = nnx.state(load_vae(workdir), graph=False)
    saved = {f"ema.{name}": array for name, array in named_leaves(vae).items()}
    source = _checkpoint_names(wanted, {name: array.shape for name, array in saved.items()}, param_groups)
    found = {
        name: saved[checkpoint_name].shape if checkpoint_name in saved else "missing"
        for name, checkpoint_name in source.items()
    }
    differ = [
        f"  {name}: {shape}, expected {wanted[name].shape}"
        for name, shape in found.items()
        if shape != wanted[name].shape
    ]
    if differ:
        raise CheckpointError("\n".join([f"{workdir}: {len(differ)} arrays of the VAE differ", *differ]))
    arrays = {
        checkpoint_name: jax.device_put(
            jnp.asarray(saved[checkpoint_name], wanted[name].dtype), wanted[name].sharding
        )
        for name, checkpoint_name in source.items()
    }
    return source, arrays, ""


_PREFIXES = ("ema.", "buffers.")


def _is_weight(name: str) -> bool:
    return name.startswith(_PREFIXES)


def _checkpoint_names(
    wanted: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]], param_groups: Mapping[str, Any]
) -> dict[str, str]:
    """Checkpoint name of each array; arrays in `param_groups` without one are omitted.

    If required arrays are missing, the names are the expected ones.
    """
    checkpoint_names = {name.partition(".")[2]: name for name in saved}
    required = [name for name in wanted if name.partition(".")[0] not in param_groups and not _is_lora(name)]
    prefixes = sorted({name.partition(".")[0] for name in checkpoint_names})
    renamings: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.partition(".")[2],
        *(lambda name, prefix=prefix: f"{prefix}.{name}" for prefix in prefixes),
    ]
    for rename in renamings:
        if all(rename(name) in checkpoint_names for name in required):
            found = {name: checkpoint_names[rename(name)] for name in required}
            break
    else:
        rename = renamings[0]
        found = {name: checkpoint_names.get(name, f"ema.{name}") for name in required}
    for part in param_groups:
        names = [name for name in wanted if name.partition(".")[0] == part]
        if all(saved.get(checkpoint_names.get(name, "")) == tuple(wanted[name].shape) for name in names):
            found |= {name: checkpoint_names[name] for name in names}
    return found


def _transformer(workdir: pathlib.Path | str) -> pathlib.Path | None:
    """Folder of a transformer in diffusers' layout: `workdir` or its `transformer`; None if neither."""
    folders = (pathlib.Path(workdir), pathlib.Path(workdir) / "transformer")
    return next((folder for folder in folders if is_transformer(folder)), None)


def _from_transformer(folder: pathlib.Path, wanted: Mapping[str, Any]) -> _ResolvedWeights:
    dit_names = {name: name.removeprefix("dit.") for name in wanted if name.startswith("dit.")}
    source = {name: dit_name for name, dit_name in dit_names.items() if not _is_lora(name)}
    left_out = {name for name in wanted.keys() - source.keys() if not _is_lora(name)}
    if not source or left_out:
        raise CheckpointError(
            f"{folder} is a transformer, and the run trains {sorted(left_out)[:3]} too: give it "
            "task.text_encoder, the encoder that belongs to these weights"
        )
    abstract = {
        dit_name: jax.ShapeDtypeStruct(wanted[name].shape, wanted[name].dtype, sharding=wanted[name].sharding)
        for name, dit_name in source.items()
    }
    return source, load_arrays(folder, abstract), ""


def _is_lora(name: str) -> bool:
    return f".{ATTRIBUTE}." in name


def _part(name: str) -> str:
    return "LoRA" if _is_lora(name) else name.partition(".")[0]


def _replaced(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    leaves = [arrays.get(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
