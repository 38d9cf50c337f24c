"""Starting a run from the weights of another, which need not have trained the same module."""

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

__all__ = ["start_from"]

_log = get_logger(__name__)


def start_from(workdir: pathlib.Path | str, state: TrainState, apart: Mapping[str, Any]) -> TrainState:
    """`state` with the averaged weights of another run as its parameters and their average; buffers too.

    Arrays are found by name, whether they are trained in either run or not, and the other module may be a
    part of this one or have it as a part: a VAE starts from a VAE with a discriminator and the other way
    around, with the encoder trained or not.

    The updates of a run of LoRA are merged into the weights that they belong to.

    Args:
      workdir: of the other run, of which the newest checkpoint is read; or where a VAE without a run lies, as
        `vidgen.train.vae_folder.load_vae` finds it, Wan's in diffusers' layout too; or a transformer in that
        layout (of a whole checkpoint `transformer`), where a transformer is trained.
      apart: names of submodules that stay as they are where the other run has none of this shape.

    Raises:
      CheckpointError: there is no checkpoint, or it is of another model; the arrays that differ, or that
        nothing here takes, are named.
      WeightsError: a VAE's weights are not whole.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    wanted = named_leaves(state.params) | named_leaves(state.buffers)
    if directory.is_dir():
        source, arrays, what = _of_a_run(directory, wanted, apart)
    elif (transformer := _transformer(workdir)) is not None:
        source, arrays, what = _of_a_transformer(transformer, wanted)
    elif has_vae(workdir):
        source, arrays, what = _of_a_vae(workdir, wanted, apart)
    else:
        raise CheckpointError(
            f"{directory} is missing: expected the workdir of a training run, a VAE, or Wan's weights"
            f"{hub_remedy(workdir)}"
        )
    fresh = sorted({_part(name) for name in wanted.keys() - source.keys()})
    _log.info("weights are those of %s%s%s", workdir, what, f"; new: {fresh}" if fresh else "")
    found = {name: arrays[there] for name, there in source.items()}
    # A run of LoRA begins without an update, whatever it begins from.
    params = _replaced(state.params, found)
    return dataclasses.replace(
        state, params=params, ema=jax.tree.map(jnp.copy, params), buffers=_replaced(state.buffers, found)
    )


_Found = tuple[dict[str, str], dict[str, jax.Array], str]
"""Where each array is found, arrays by place, and what to say of them."""


def _of_a_run(directory: pathlib.Path, wanted: Mapping[str, Any], apart: Mapping[str, Any]) -> _Found:
    with CheckpointManager(directory) as checkpoints:
        saved = checkpoints.shapes()
        weights = {name: saved[name] for name in saved if _is_weight(name)}
        source = _source(wanted, {name: x for name, x in weights.items() if not _is_update(name)}, apart)
        abstract = {
            source[name]: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in wanted.items()
            if name in source
        }
        updates = {name: x for name, x in weights.items() if _is_update(name)}
        _check_all_taken(directory, weights, {*source.values(), *updates})
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        abstract |= {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
            for name, shape in updates.items()
        }
        step, arrays = checkpoints.restore_named(abstract)
    merged = ", its LoRA merged" if updates else ""
    return source, _merged(directory.parent, arrays, updates), f" after step {step}{merged}"


def _check_all_taken(directory: pathlib.Path, saved: Iterable[str], taken: set[str]) -> None:
    """Sees to it that of each submodule that is taken all arrays are.

    Whole submodules may be left: a discriminator, the text encoder of another kind of run.
    """
    names = {name.partition(".")[2]: name for name in saved}
    parts = {name.partition(".")[2].partition(".")[0] for name in taken}
    left = sorted(name for name, place in names.items() if place not in taken)
    lost = [name for name in left if name.partition(".")[0] in parts]
    if lost:
        shown = "\n  ".join(lost[:20] + (["..."] if len(lost) > 20 else []))
        raise CheckpointError(
            f"{directory} is of another model: it has {len(lost)} arrays that this one does not. Use the "
            f"config that it was trained with\n  {shown}"
        )
    if left:
        _log.info("left out of %s: %s", directory, sorted({name.partition(".")[0] for name in left}))


def _merged(
    workdir: pathlib.Path, arrays: dict[str, jax.Array], updates: Iterable[str]
) -> dict[str, jax.Array]:
    """The arrays, each kernel with the update of low rank that the run has trained for it."""
    ends = tuple(f".{ATTRIBUTE}.{side}" for side in ("down", "up"))
    maps = sorted({name.removesuffix(ends[0]) for name in updates if name.endswith(ends[0])})
    if not maps:
        return arrays
    scale = _lora_scale(workdir)
    kernels = {name.partition(".")[2]: name for name in arrays if not _is_update(name)}
    for linear in maps:
        kernel = kernels[f"{linear.partition('.')[2]}.kernel"]
        down, up = (arrays[linear + end] for end in ends)
        merged = _add_update(arrays[kernel], down, up, jnp.float32(scale))
        arrays[kernel] = jax.device_put(merged, arrays[kernel].sharding)
    return arrays


@jax.jit
def _add_update(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: jax.Array) -> jax.Array:
    return kernel + scale * jnp.matmul(down, up, precision="highest").astype(kernel.dtype)


def _lora_scale(workdir: pathlib.Path) -> float:
    task = load_experiment(workdir).task
    lora = task.lora if isinstance(task, TextToVideoTask) else None
    if lora is None:
        raise CheckpointError(
            f"{workdir / 'config.json'} has no task.lora, which should give the strength of the LoRA "
            "that the checkpoints hold: restore the file"
        )
    return lora.scale


def _of_a_vae(workdir: pathlib.Path | str, wanted: Mapping[str, Any], apart: Mapping[str, Any]) -> _Found:
    vae = nnx.state(load_vae(workdir), graph=False)
    saved = {f"ema.{name}": array for name, array in named_leaves(vae).items()}
    source = _source(wanted, {name: array.shape for name, array in saved.items()}, apart)
    found = {name: saved[place].shape if place in saved else "missing" for name, place in source.items()}
    differ = [
        f"  {name}: {shape}, expected {wanted[name].shape}"
        for name, shape in found.items()
        if shape != wanted[name].shape
    ]
    if differ:
        raise CheckpointError("\n".join([f"{workdir}: {len(differ)} arrays of the VAE differ", *differ]))
    arrays = {
        place: jax.device_put(jnp.asarray(saved[place], wanted[name].dtype), wanted[name].sharding)
        for name, place in source.items()
    }
    return source, arrays, ""


_PLACES = ("ema.", "buffers.")


def _is_weight(name: str) -> bool:
    return name.startswith(_PLACES)


def _source(
    wanted: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]], apart: Mapping[str, Any]
) -> dict[str, str]:
    """The name in the checkpoint of each array; those without one are left out if they are `apart`.

    Where the rest is not all there, the names are those that it should have.
    """
    places = {name.partition(".")[2]: name for name in saved}
    required = [name for name in wanted if name.partition(".")[0] not in apart and not _is_update(name)]
    inside = sorted({name.partition(".")[0] for name in places})
    renamings: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.partition(".")[2],
        *(lambda name, top=top: f"{top}.{name}" for top in inside),
    ]
    for there in renamings:
        if all(there(name) in places for name in required):
            found = {name: places[there(name)] for name in required}
            break
    else:
        there = renamings[0]
        found = {name: places.get(name, f"ema.{name}") for name in required}
    for part in apart:
        names = [name for name in wanted if name.partition(".")[0] == part]
        if all(saved.get(places.get(name, "")) == tuple(wanted[name].shape) for name in names):
            found |= {name: places[name] for name in names}
    return found


def _transformer(workdir: pathlib.Path | str) -> pathlib.Path | None:
    """The folder of a transformer as diffusers keeps it: `workdir` itself, or in it."""
    folders = (pathlib.Path(workdir), pathlib.Path(workdir) / "transformer")
    return next((folder for folder in folders if is_transformer(folder)), None)


def _of_a_transformer(folder: pathlib.Path, wanted: Mapping[str, Any]) -> _Found:
    ours = {name: name.removeprefix("dit.") for name in wanted if name.startswith("dit.")}
    source = {name: inside for name, inside in ours.items() if not _is_update(name)}
    left_out = {name for name in wanted.keys() - source.keys() if not _is_update(name)}
    if not source or left_out:
        raise CheckpointError(
            f"{folder} is a transformer, and the run trains {sorted(left_out)[:3]} too: give it "
            "task.text_encoder, the encoder that belongs to these weights"
        )
    abstract = {
        inside: jax.ShapeDtypeStruct(wanted[name].shape, wanted[name].dtype, sharding=wanted[name].sharding)
        for name, inside in source.items()
    }
    return source, load_arrays(folder, abstract), ""


def _is_update(name: str) -> bool:
    return f".{ATTRIBUTE}." in name


def _part(name: str) -> str:
    return "LoRA" if _is_update(name) else name.partition(".")[0]


def _replaced(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    leaves = [arrays.get(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
