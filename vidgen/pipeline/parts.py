"""Checks and copies the parts of a checkpoint that need no conversion."""

import pathlib
import shutil
from collections.abc import Callable, Mapping

from flax import nnx

from vidgen.ckpt.pretrained import check_module
from vidgen.ckpt.tensor_files import PICKLES, TensorFiles
from vidgen.core.config import resolve
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.models.clip import transformers_folder as clip_folder
from vidgen.models.t5 import transformers_folder as t5_folder
from vidgen.models.t5.tokenizer import PromptTokenizer
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.text.model import ByteEncoder
from vidgen.parallel import processes
from vidgen.pipeline.sampling_file import read_scheduler

__all__ = ["copy_part", "refuse_pickles"]

_WEIGHTS = "model.safetensors"
_AGAIN = "download it again from the checkpoint's source"


def _check_byte_encoder(folder: pathlib.Path) -> None:
    path = folder / "config.json"
    config = resolve(ByteEncoderConfig, read_json(path, remedy=_AGAIN), where=str(path))
    check_module(folder / _WEIGHTS, lambda: ByteEncoder(config, rngs=nnx.Rngs(0)))


def _check_processor(folder: pathlib.Path) -> None:
    read_json(folder / "preprocessor_config.json", remedy=_AGAIN)


_TOKENIZER = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_FILES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("config.json", _WEIGHTS),
    "byte_encoder": ("config.json", _WEIGHTS),
    "image_encoder": ("config.json", _WEIGHTS),
    "tokenizer": _TOKENIZER,
    "image_processor": ("preprocessor_config.json",),
    "scheduler": ("scheduler_config.json",),
}
"""Files that a part may have; weights may be several files listed in an index."""

_CHECKS: Mapping[str, Callable[[pathlib.Path], object]] = {
    "text_encoder": t5_folder.check_folder,
    "byte_encoder": _check_byte_encoder,
    "image_encoder": clip_folder.check_folder,
    "tokenizer": PromptTokenizer,
    "image_processor": _check_processor,
    "scheduler": read_scheduler,
}


def copy_part(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files that the format defines for a part, after checking that the part can be loaded.

    A file may be a symbolic link to a file within the checkpoint or, in Hugging Face's cache, to one of the
    cache's blobs. A part may be a link to another folder.

    Args:
      source: folder of the part, within the folder of its checkpoint.
      target: a new folder, named after the part.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: the part cannot be loaded, is pickled, or has a link that leaves its folder.
      WeightsError: the weights do not fit their config.
    """
    files: list[pathlib.Path] = []
    for name in _FILES[target.name]:
        path = source / name
        if name == _WEIGHTS:
            _refuse_pickles_alone(source)
            _check_inside(path.with_name(f"{name}.index.json"), source)
            _check_inside(path, source)
            weights = TensorFiles(path)
            files += [*({weights.path, *weights.files})]
        elif path.exists():
            files.append(path)
    for path in files:
        _check_inside(path, source)
    _CHECKS[target.name](source)
    if processes.is_main_process():
        target.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, target / path.name)


def refuse_pickles(source: pathlib.Path) -> None:
    """Raises an error that explains how to convert pickled weights.

    Raises:
      UserError: `source` is a pickle, or a folder whose weights are all pickles.
    """
    pickled = [source] if source.suffix in PICKLES else []
    if source.is_dir() and not any(source.rglob("*.safetensors")):
        pickled = [path for path in sorted(source.rglob("*")) if path.suffix in PICKLES]
    if pickled:
        raise UserError(
            f"{pickled[0]} is a pickle, which can run any code when it is loaded, and is never loaded here. "
            "Take the safetensors files of the same model; or, if you trust it, convert it where PyTorch is: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )


def _refuse_pickles_alone(folder: pathlib.Path) -> None:
    paths = list(folder.iterdir())
    pickled = [path for path in paths if path.suffix in PICKLES]
    if pickled and not any(path.suffix == ".safetensors" for path in paths):
        refuse_pickles(min(pickled))


def _check_inside(path: pathlib.Path, part: pathlib.Path) -> None:
    """Raises UserError unless a file is missing, or is a regular file of the checkpoint."""
    if not path.exists():
        return
    roots = [part.parent.resolve(), part.resolve()]
    # In Hugging Face's cache, files in models--NAME/snapshots/REVISION/part link to models--NAME/blobs.
    roots += [
        parent.parent / "blobs" for root in roots for parent in root.parents if parent.name == "snapshots"
    ]
    resolved = path.resolve()
    if not any(resolved.is_relative_to(root) for root in roots):
        raise UserError(
            f"{path} is a link to {resolved}, outside of {part.parent}: only what is inside is copied; "
            "put the file itself there if it belongs to the checkpoint"
        )
    if not path.is_file():
        raise UserError(f"{path} is no regular file: {_AGAIN}")
