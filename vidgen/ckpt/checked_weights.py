"""Weights files with a digest of each array in the header, verified on load."""

import json
import pathlib
from typing import Any

from vidgen.ckpt.digests import array_digests
from vidgen.ckpt.tensor_files import TensorFiles, WeightsError
from vidgen.ckpt.weights import save_weights
from vidgen.core.logging import get_logger
from vidgen.core.tree import named_leaves
from vidgen.core.typing import PyTree

__all__ = ["save_checked_weights", "verify_weights"]

_log = get_logger(__name__)
_KEY = "vidgen.digests"


def save_checked_weights(path: pathlib.Path | str, tree: PyTree) -> None:
    """Saves `tree` with `ckpt.weights.save_weights`, with digests in the header.

    With several processes all of them must call this; process 0 writes.
    """
    digests = array_digests(named_leaves(tree))
    save_weights(path, tree, metadata={_KEY: json.dumps(digests)})


def verify_weights(path: pathlib.Path | str, tree: PyTree, *, remedy: str) -> None:
    """Verifies loaded arrays against the digests in the file's header.

    A file of an older version without digests is not verified. With several processes all of them must call
    this.

    Args:
      tree: as loaded from the file; an array with another dtype than in the file is read again.
      remedy: what to do, for the error message.

    Raises:
      WeightsError: arrays differ from what was written; the message names them.
    """
    files = TensorFiles(path)
    if _KEY not in files.metadata:
        _log.info("%s is from before weights had digests: it is not verified", path)
        return
    try:
        digests: Any = json.loads(files.metadata[_KEY])
        written = {name: str(digests[name]) for name in files.shapes}
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: its digests cannot be read. {remedy}") from error
    arrays = {
        name: array if array.dtype == files.dtypes[name] else files.read(name)
        for name, array in named_leaves(tree).items()
    }
    changed = [name for name, found in array_digests(arrays).items() if found != written[name]]
    if changed:
        shown = ", ".join(changed[:3] + ["..."] * (len(changed) > 3))
        raise WeightsError(
            f"{path} is damaged: {len(changed)} of {len(arrays)} arrays are not what was written ({shown}). "
            f"{remedy}"
        )
