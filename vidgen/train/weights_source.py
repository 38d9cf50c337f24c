"""Weights of a run, a VAE or a transformer, found by name for a module that may be another."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vidgen.ckpt.checked_weights import verify_weights
from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.ckpt.weights import load_weights
from vidgen.core.logging import get_logger
from vidgen.core.paths import hub_remedy
from vidgen.core.tree import named_leaves
from vidgen.models.dit.diffusers_folder import is_transformer, load_arrays
from vidgen.nn.lora import ATTRIBUTE
from vidgen.train.base_files import BaseFiles
from vidgen.train.experiment import load_experiment
from vidgen.train.options import RunOptions
from vidgen.train.vae_folder import has_vae, load_vae

__all__ = ["Weights", "base_weights", "find_weights", "is_lora"]

_log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Arrays of a source.

    Attributes:
      arrays: by the names of the module that gets them.
      origin: where in the source they come from, for messages; may be empty.
      step: step of the run that they come from; None if the source is no run.
      exact: whether they are the stored numbers; False if LoRA matrices were merged into them.
    """

    arrays: dict[str, jax.Array]
    origin: str = ""
    step: int | None = None
    exact: bool = True


def base_weights(workdir: pathlib.Path, run: RunOptions, wanted: Mapping[str, Any]) -> Weights:
    """Base of a LoRA run.

    Args:
      wanted: shape, dtype and sharding of each array of the base.

    Raises:
      CheckpointError: the source is missing, or of another model.
    """
    files = BaseFiles(workdir)
    if files.weights.exists():
        arrays = load_weights(files.weights, dict(wanted))
        verify_weights(files.weights, arrays, remedy="Bring it back from a copy")
        return Weights(arrays=arrays)
    if run.init_from is None or not pathlib.Path(run.init_from).exists():
        raise CheckpointError(
            f"{workdir} trains a LoRA on the weights of run.init_from={run.init_from!r}, which is missing: "
            f"{BaseFiles.REMEDY}"
        )
    step = files.record().step
    try:
        return find_weights(run.init_from, wanted, step=step)
    except CheckpointError as error:
        if step is None:
            raise
        raise CheckpointError(f"{error}. {workdir} trains a LoRA on them: {BaseFiles.REMEDY}") from error


def find_weights(
    path: pathlib.Path | str, wanted: Mapping[str, Any], new: Collection[str] = (), step: int | None = None
) -> Weights:
    """Weights of a source for the arrays of a module, by name, whether either trains them or not.

    One module may be a submodule of the other: a VAE can start from a VAE with a discriminator and the other
    way around, with the encoder trained or not. LoRA matrices of a run are merged into their kernels.

    Args:
      path: workdir of a run, whose averaged weights are read; or a VAE without a run, as
        `vidgen.train.vae_folder.load_vae` finds it, also Wan's in diffusers' layout; or a transformer in that
        layout (for a full checkpoint, its `transformer`) if the run trains a transformer.
      wanted: shape, dtype and sharding of each array; LoRA matrices are not looked for.
      new: names of submodules that may be absent.
      step: step of a run's checkpoint; None is the newest.

    Raises:
      CheckpointError: there is no checkpoint, or it is of another model; the message names the arrays that
        differ or have no counterpart here.
      WeightsError: a VAE's weights are damaged.
    """
    directory = pathlib.Path(path) / "checkpoints"
    if directory.is_dir():
        return _from_run(directory, wanted, new, step)
    if (transformer := _transformer(path)) is not None:
        return _from_transformer(transformer, wanted)
    if has_vae(path):
        return _from_vae(path, wanted, new)
    raise CheckpointError(
        f"{directory} is missing: expected the workdir of a training run, a VAE, or Wan's weights"
        f"{hub_remedy(path)}"
    )


def is_lora(name: str) -> bool:
    """Whether an array is a LoRA matrix."""
    return f".{ATTRIBUTE}." in name


def _from_run(
    directory: pathlib.Path, wanted: Mapping[str, Any], new: Collection[str], step: int | None
) -> Weights:
    with CheckpointManager(directory) as checkpoints:
        saved = checkpoints.shapes(step)
        weights = {name: saved[name] for name in saved if name.startswith(_PREFIXES)}
        lora = {name: shape for name, shape in weights.items() if is_lora(name)}
        source: dict[str, str] = {}
        if weights.keys() != lora.keys():
            source = _checkpoint_names(wanted, {n: x for n, x in weights.items() if n not in lora}, new)
            _check_all_used(directory, weights, {*source.values(), *lora})
        abstract = {saved_name: wanted[name] for name, saved_name in source.items()}
        mesh = jax.tree.leaves(dict(wanted))[0].sharding.mesh
        abstract |= {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
            for name, shape in lora.items()
        }
        step, found = checkpoints.restore_named(abstract, step)
    if not lora:
        return Weights(
            arrays={name: found[saved_name] for name, saved_name in source.items()},
            origin=f" after step {step}",
            step=step,
        )
    workdir = directory.parent
    experiment = load_experiment(workdir)
    if experiment.task.lora is None:
        raise CheckpointError(
            f"{workdir / 'config.json'} has no task.lora, but the checkpoints contain LoRA "
            "matrices, whose scale it defines: restore the file"
        )
    # Runs of an older version have the base in their checkpoints.
    arrays = {name: found[saved_name] for name, saved_name in source.items()}
    if not arrays:
        base = {name: leaf for name, leaf in wanted.items() if not is_lora(name)}
        arrays = base_weights(workdir, experiment.run, base).arrays
    _merge_lora(arrays, {name: found[name] for name in lora}, experiment.task.lora.scale)
    return Weights(arrays=arrays, origin=f" after step {step}, its LoRA merged", step=step, exact=False)


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


def _merge_lora(arrays: dict[str, jax.Array], lora: Mapping[str, jax.Array], scale: float) -> None:
    """Merges LoRA matrices, by their names in a checkpoint, into the kernels among `arrays`, in place."""
    down_end, up_end = (f".{ATTRIBUTE}.{side}" for side in ("down", "up"))
    for linear in sorted(name.removesuffix(down_end) for name in lora if name.endswith(down_end)):
        name = f"{linear.partition('.')[2]}.kernel"
        merged = _add_lora(arrays[name], lora[linear + down_end], lora[linear + up_end], jnp.float32(scale))
        arrays[name] = jax.device_put(merged, arrays[name].sharding)


@jax.jit
def _add_lora(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: jax.Array) -> jax.Array:
    product = scale * jnp.matmul(down, up, precision="highest")
    return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)


def _from_vae(path: pathlib.Path | str, wanted: Mapping[str, Any], new: Collection[str]) -> Weights:
    vae = nnx.state(load_vae(path), graph=False)
    saved = {f"ema.{name}": array for name, array in named_leaves(vae).items()}
    source = _checkpoint_names(wanted, {name: array.shape for name, array in saved.items()}, new)
    found = {
        name: saved[saved_name].shape if saved_name in saved else "missing"
        for name, saved_name in source.items()
    }
    differ = [
        f"  {name}: {shape}, expected {wanted[name].shape}"
        for name, shape in found.items()
        if shape != wanted[name].shape
    ]
    if differ:
        raise CheckpointError("\n".join([f"{path}: {len(differ)} arrays of the VAE differ", *differ]))
    return Weights(
        arrays={
            name: jax.device_put(jnp.asarray(saved[saved_name], wanted[name].dtype), wanted[name].sharding)
            for name, saved_name in source.items()
        }
    )


def _transformer(path: pathlib.Path | str) -> pathlib.Path | None:
    """Folder of a transformer in diffusers' layout: `path` or its `transformer`; None if neither."""
    folders = (pathlib.Path(path), pathlib.Path(path) / "transformer")
    return next((folder for folder in folders if is_transformer(folder)), None)


def _from_transformer(folder: pathlib.Path, wanted: Mapping[str, Any]) -> Weights:
    names = {
        name: name.removeprefix("dit.") for name in wanted if name.startswith("dit.") and not is_lora(name)
    }
    left_out = {name for name in wanted.keys() - names.keys() if not is_lora(name)}
    if not names or left_out:
        raise CheckpointError(
            f"{folder} is a transformer, and the run trains {sorted(left_out)[:3]} too: give it "
            "task.text_encoder, the encoder that belongs to these weights"
        )
    found = load_arrays(folder, {dit_name: wanted[name] for name, dit_name in names.items()})
    return Weights(arrays={name: found[dit_name] for name, dit_name in names.items()})


_PREFIXES = ("ema.", "buffers.")


def _checkpoint_names(
    wanted: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]], new: Collection[str]
) -> dict[str, str]:
    """Checkpoint name of each array; arrays of submodules in `new` without one are omitted.

    If required arrays are missing, the names are the expected ones.
    """
    checkpoint_names = {name.partition(".")[2]: name for name in saved}
    required = [name for name in wanted if name.partition(".")[0] not in new and not is_lora(name)]
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
    for part in new:
        names = [name for name in wanted if name.partition(".")[0] == part]
        if all(saved.get(checkpoint_names.get(name, "")) == tuple(wanted[name].shape) for name in names):
            found |= {name: checkpoint_names[name] for name in names}
    return found
