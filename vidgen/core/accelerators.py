"""What jax looks for when it starts, where nothing can be found."""

import glob
import importlib.util
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence

__all__ = ["skip_absent_tpu"]

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Of TPUs up to v4, and since v5."""
_NOT_OF_A_TPU = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL")
"""Variables that jax sets for the programs that it starts, and compiling for a TPU, where none is."""


def skip_absent_tpu(
    environment: MutableMapping[str, str] = os.environ,
    *,
    devices: Sequence[str] = _DEVICES,
    installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> None:
    """Sets JAX_PLATFORMS to cpu where jax would find CPUs only, and libtpu would print errors about it first.

    That is where libtpu is installed, to compile for TPUs that are elsewhere, and no plugin for other devices
    is; there is no device of a TPU, no variable names one, and JAX_PLATFORMS is not set. jax may have been
    imported already, but not used.

    Args:
      devices: patterns of the files that stand for a TPU.
      installed: whether there is a package of a name.
    """
    named = [name for name in environment if name.startswith(("TPU_", "CLOUD_TPU_", "JAX_FORCE_TPU_INIT"))]
    if "JAX_PLATFORMS" in environment or set(named) - set(_NOT_OF_A_TPU):
        return
    if not installed("libtpu") or installed("jax_plugins") or any(glob.glob(pattern) for pattern in devices):
        return
    environment["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
