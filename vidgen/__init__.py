"""vidgen: trains and samples text-to-video models in JAX.

pipe = vidgen.load("runs/dit")
video = pipe("a red circle moving left", num_frames=17, seed=0)
vidgen.save_video("a.mp4", video, fps=pipe.fps)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidgen.data.video_io import save_video
    from vidgen.pipeline import Pipeline, Request, load

__all__ = ["Pipeline", "Request", "__version__", "load", "save_video"]

__version__ = "0.1.0"

_MODULES = {
    "Pipeline": "vidgen.pipeline",
    "Request": "vidgen.pipeline",
    "load": "vidgen.pipeline",
    "save_video": "vidgen.data.video_io",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `vidgen --help` does not wait for JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module 'vidgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
