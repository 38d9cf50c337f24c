"""Meshes of fewer than the eight devices, for tests of which they are not the point."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from vidgen.parallel.mesh import MeshOptions


@contextlib.contextmanager
def few_devices(count: int) -> Iterator[None]:
    """Meshes are built over `count` devices, unless their devices are given."""
    build = MeshOptions.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MeshOptions,
            "build",
            lambda self, devices=None: build(self, jax.devices()[:count] if devices is None else devices),
        )
        yield
