"""The Python API: load a model and call it with a prompt."""

from vidgen.pipeline.load import load
from vidgen.pipeline.pipeline import Pipeline, Progress
from vidgen.sampling.request import Request

__all__ = ["Pipeline", "Progress", "Request", "load"]
