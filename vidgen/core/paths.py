"""Paths given by users: on this machine's file systems, or among the files packaged with vidgen."""

import argparse
import importlib.resources
import os
import pathlib
import re

from vidgen.core.errors import UserError

__all__ = ["hub_remedy", "local_path", "packaged", "packaged_experiments", "path_option", "require_local"]

_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|(?:gs|gcs|s3|hdfs|https?|hf|abfss?|wasbs?|az|file):/)")
"""Addresses of buckets and servers; the second form is what `pathlib.Path` makes of the first."""
_FOLDER = "experiments"


def require_local(path: str, where: str) -> str:
    """Returns `path` if it is local.

    Raises:
      UserError: `path` is the address of a bucket or a server; the message begins with `where`.
    """
    if _REMOTE.match(path):
        scheme = path.partition(":")[0]
        raise UserError(
            f"{where}: found {path!r}, but {scheme}:// is neither read nor written yet: give a path on this "
            "machine, where a bucket can be mounted (gcsfuse, s3fs)"
        )
    return path


def local_path(path: pathlib.Path | str, where: str = "path") -> pathlib.Path:
    """`path` as a `Path`.

    Raises:
      UserError: as in `require_local`.
    """
    return pathlib.Path(require_local(os.fspath(path), where))


def hub_remedy(path: pathlib.Path | str) -> str:
    """Remedy for a missing `path` that looks like `owner/name` on a hub; otherwise empty."""
    name = os.fspath(path)
    if os.path.exists(name) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return ""
    folder = name.partition("/")[2]
    return (
        f". If it is the name of a model on the Hugging Face hub, download it first: "
        f"`pip install huggingface_hub`, `hf download {name} --local-dir {folder}`, then give {folder}"
    )


def path_option(text: str) -> pathlib.Path:
    """Path parsed from a command-line argument (`add_argument("--out", type=path_option)`).

    Raises:
      ArgumentTypeError: as in `require_local`; argparse names the option.
    """
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error


def packaged_experiments() -> pathlib.Path:
    """Folder of the experiments packaged with vidgen."""
    return pathlib.Path(str(importlib.resources.files(f"vidgen.{_FOLDER}")))


def packaged(path: pathlib.Path | str) -> pathlib.Path:
    """`path` if it exists or is not packaged with vidgen; otherwise the packaged file or folder.

    So `experiments/weights/sprites_vae` is found from any folder, and a user's file of that name takes
    precedence.
    """
    path = pathlib.Path(path)
    if path.exists() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == (_FOLDER,) else path.parts
    bundled = packaged_experiments().joinpath(*parts)
    return bundled if parts and ".." not in parts and bundled.exists() else path
