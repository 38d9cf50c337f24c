"""Skips JAX's search for a TPU on machines without one."""

import glob
import importlib.util
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence

__all__ = ["skip_absent_tpu"]

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Device files of TPUs: up to v4, and from v5 on."""
_UNRELATED_VARIABLES = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL")
"""TPU variables that need no TPU: JAX sets them for child processes and for compilation without a device."""


def skip_absent_tpu(
    environment: MutableMapping[str, str] = os.environ,
    *,
    devices: Sequence[str] = _DEVICES,
    installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> None:
    """Sets JAX_PLATFORMS=cpu if JAX would find CPUs only, after errors printed by libtpu.

    Applies if libtpu is installed (to compile for TPUs on other machines) and no plugin for other devices is,
    there is no TPU device file, no environment variable names a TPU, and JAX_PLATFORMS is unset. JAX may
    already be imported, but not used.

    Args:
      devices: glob patterns of TPU device files.
      installed: whether a package of the given name is installed.
    """
    named = [name for name in environment if name.startswith(("TPU_", "CLOUD_TPU_", "JAX_FORCE_TPU_INIT"))]
    if "JAX_PLATFORMS" in environment or set(named) - set(_UNRELATED_VARIABLES):
        return
    if not installed("libtpu") or installed("jax_plugins") or any(glob.glob(pattern) for pattern in devices):
        return
    environment["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
