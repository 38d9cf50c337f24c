"""Converts checkpoints of other programs to diffusers' layout, the layout that vidgen reads."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from vidgen.ckpt.json_files import write_json
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import check_target, read_json, replacing
from vidgen.core.logging import get_logger
from vidgen.core.paths import hub_remedy
from vidgen.models.dit import diffusers_folder as dit_folder
from vidgen.models.dit.wan_file import load_wan
from vidgen.models.video_vae import diffusers_folder as vae_folder
from vidgen.parallel import processes
from vidgen.parallel.rules import shardings
from vidgen.pipeline.diffusers_folder import INDEX, PARTS, is_checkpoint, read_index
from vidgen.pipeline.parts import copy_part, refuse_pickles
from vidgen.pipeline.sampling_file import copy_sampling

__all__ = ["import_checkpoint", "new_folder"]

_log = get_logger(__name__)

_TRANSFORMERS = ("transformer", "transformer_2")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_EXPERTS = ("high_noise_model", "low_noise_model")
"""Transformer folders of Wan 2.2's A14B, as its authors published it."""


def import_checkpoint(
    source: pathlib.Path | str,
    target: pathlib.Path | str,
    *,
    mesh: Mesh,
    parts: pathlib.Path | str | None = None,
    num_heads: int | None = None,
) -> None:
    """Writes a checkpoint to `target` atomically, with every value unchanged.

    The transformers and the VAE are loaded onto the mesh, one shard of one array at a time, and checked
    against their configs. For the other parts (text and image encoder, tokenizer, scheduler) the files that
    belong to the format are copied, after `vidgen.pipeline.parts` has checked them.

    Args:
      source: a whole diffusers checkpoint, or its folder `transformer`; a folder in the layout of Wan's
        authors; or a transformer in one file, with diffusers' or Wan's tensor names.
      parts: a whole diffusers checkpoint that provides the parts that `source` lacks.
      num_heads: for a transformer that is neither one of Wan's nor has a config.json.

    Raises:
      FileNotFoundError: `source` has nothing to import.
      UserError: the weights are pickled, or of another model; `target` is not empty.
      WeightsError: lists every tensor that is missing, unexpected or of another shape.
    """
    source = pathlib.Path(source)
    check_target(target, folder=True)
    refuse_pickles(source)
    if parts is not None and not is_checkpoint(parts):
        raise FileNotFoundError(f"{parts} is no whole checkpoint for diffusers: it has no {INDEX}")
    rest = pathlib.Path(parts) if parts is not None else source if is_checkpoint(source) else None
    transformers = _transformers(source, num_heads)
    with new_folder(target) as folder:
        # The small parts come first, so that their errors are found before large files are written.
        if rest is not None:
            _copy_rest(rest, folder, mesh, of_parts=parts is not None, experts=len(transformers) == 2)
        for name, (path, load) in transformers.items():
            _log.info("%s: %s", name, path)
            dit_folder.save_diffusers(load(mesh=mesh), folder / name)


def _transformers(source: pathlib.Path, num_heads: int | None) -> dict[str, tuple[pathlib.Path, Any]]:
    """Folder name -> (path, function that loads the transformer onto a mesh)."""
    if source.is_file():
        return {"transformer": (source, functools.partial(load_wan, source, num_heads=num_heads))}
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: there is no such folder or file{hub_remedy(source)}")
    if is_checkpoint(source):
        names = [name for name in _TRANSFORMERS if (source / name).is_dir()]
        return {name: (source / name, _diffusers(source / name)) for name in names}
    experts = [source / name for name in _EXPERTS if (source / name).is_dir()]
    if experts:
        return {name: _one(path, num_heads) for name, path in zip(_TRANSFORMERS, experts, strict=True)}
    return {"transformer": _one(source, num_heads)}


def _one(folder: pathlib.Path, num_heads: int | None) -> tuple[pathlib.Path, Any]:
    """Path and loader of the transformer in a folder that holds only a transformer."""
    config = folder / "config.json"
    values = read_json(config, remedy="download it again from the weights' source") if config.exists() else {}
    if values.get("_class_name") == "WanTransformer3DModel":
        return folder, _diffusers(folder)
    files = [path for path in (folder / _WEIGHTS, *sorted(folder.glob("*.safetensors"))) if path.exists()]
    if (folder / f"{_WEIGHTS}.index.json").exists():
        files = [folder / _WEIGHTS]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no transformer in safetensors files: expected {INDEX}, or {_WEIGHTS}"
        )
    if "num_heads" in values:
        num_heads = limits.HEADS.check(values["num_heads"], f"{config}: num_heads")
    return files[0], functools.partial(load_wan, files[0], num_heads=num_heads)


def _diffusers(folder: pathlib.Path):
    return functools.partial(dit_folder.load_diffusers, folder, keep_dtypes=True)


def _copy_rest(
    source: pathlib.Path, folder: pathlib.Path, mesh: Mesh, *, of_parts: bool, experts: bool
) -> None:
    index = read_index(source)
    for name in PARTS:
        if (index.get(name) or [None])[0] is None or name in _TRANSFORMERS:
            continue
        if not (source / name).is_dir():
            raise FileNotFoundError(f"{source / name} is missing, which {source / INDEX} lists: download it")
        if name == "vae":
            vae = vae_folder.load_diffusers(source / name, keep_dtypes=True)
            vae_folder.save_diffusers(jax.device_put(vae, shardings(vae, mesh)), folder / name)
        else:
            copy_part(source / name, folder / name)
    two = ["diffusers", "WanTransformer3DModel"] if experts else [None, None]
    new_index = index | ({"transformer_2": two} if "transformer_2" in index or experts else {})
    if experts and new_index.get("boundary_ratio") is None:
        raise UserError(
            f"{source / INDEX} has no boundary_ratio, which two transformers need: "
            f"{'--parts must be' if of_parts else 'it must be'} of the same model"
        )
    write_json(folder / INDEX, new_index)
    copy_sampling(source, folder)


@contextlib.contextmanager
def new_folder(target: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Creates a folder atomically: it is renamed to `target` when the block succeeds, deleted when it fails.

    Until then it has a temporary name next to `target`. All processes must call this; process 0 creates the
    folder.

    Raises:
      UserError: `target` exists and is not an empty folder, or cannot be written.
    """
    target = pathlib.Path(target)
    check_target(target, folder=True)
    main = processes.is_main_process()
    with replacing(target, folder=True) if main else contextlib.nullcontext() as made:
        try:
            yield target.with_name(processes.broadcast_text("" if made is None else made.name))
        finally:
            processes.sync("folder written")
