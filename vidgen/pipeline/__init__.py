"""The Python face: load a model, call it with a prompt."""

from vidgen.pipeline.load import load
from vidgen.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "load"]
