"""Exports a sampler as a StableHLO program (by `jax.export`) that needs only JAX to run."""

import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vidgen.ckpt.json_files import write_json
from vidgen.core.errors import UserError
from vidgen.core.streams import TEXT, Stream
from vidgen.core.typing import Array
from vidgen.models.text.tokenizer import END, PADDING
from vidgen.models.text_to_video import latent_shape
from vidgen.pipeline.importing import new_folder
from vidgen.pipeline.pipeline import Pipeline
from vidgen.sampling.conditioning import Condition, Target
from vidgen.sampling.programs import denoise_on_device
from vidgen.sampling.request import Request
from vidgen.sampling.sampler import initial_noise

__all__ = ["export_sampler"]

_PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _WEIGHTS, _CONFIG, _EXAMPLE = "sampler.bin", "weights.npz", "config.json", "sample.py"


def export_sampler(
    pipe: Pipeline,
    target: pathlib.Path | str,
    *,
    batch_size: int = 1,
    size: tuple[int, int, int] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Writes the sampler of `pipe` for clips of one size to a new folder, atomically.

    The folder holds the program for CPUs, NVIDIA GPUs and TPUs, the weights, and `sample.py`, which shows how
    to call it with only JAX (and flatbuffers, JAX's serialization format). The program takes seeds, and the
    bytes of the prompts for a model with a byte encoder or prompt features for another text encoder.

    Args:
      size: frames, height and width, in pixels; None is the pipeline's.
      steps, guidance_scale: as in `Pipeline.__call__`; the program fixes them.

    Raises:
      UserError: the model does not support the size, or needs an image; `target` is not empty.
    """
    provided = {name for conditioner in pipe.conditioners for name in conditioner.provides}
    if provided != {TEXT}:
        raise UserError("the model generates videos from images, which an exported sampler does not take")
    size = pipe.size if size is None else size
    shape = latent_shape(pipe.vae.config, pipe.model.dit.config, size)
    options = Request(prompt="", steps=steps, guidance_scale=guidance_scale).options(pipe.options)
    leaves, treedef = jax.tree.flatten((pipe.model, pipe.vae))
    text, described = _text_inputs(pipe, batch_size)

    def program(weights: list[Array], seeds: Array, positive: Any, negative: Any) -> Array:
        model, vae = jax.tree.unflatten(treedef, weights)
        streams = [
            {TEXT: Stream(inputs[0]) if model.text is None else model.encode_text(*inputs)}
            for inputs in (positive, negative)
        ]
        condition = Condition(streams[0], negative=streams[1])
        return denoise_on_device(model.dit, vae, initial_noise(seeds, shape), condition, options=options)

    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.uint32)
    exported = jax.export.export(jax.jit(program), platforms=_PLATFORMS)(weights, seeds, text, text)
    with new_folder(target) as folder:
        (folder / _PROGRAM).write_bytes(exported.serialize())
        _save_arrays(folder / _WEIGHTS, leaves)
        dtypes = [str(leaf.dtype) for leaf in leaves]
        about = {"batch_size": batch_size, "num_frames": size[0], "height": size[1], "width": size[2]}
        write_json(folder / _CONFIG, about | {"fps": pipe.fps, "text": described, "dtypes": dtypes})
        (folder / _EXAMPLE).write_text(_SAMPLE)


def _text_inputs(pipe: Pipeline, batch_size: int) -> tuple[tuple[jax.ShapeDtypeStruct, ...], dict[str, Any]]:
    """Shapes of the program's prompt inputs, and their description in config.json."""
    text = pipe.model.text
    if text is None:
        target = Target(pipe.model, pipe.vae, pipe.size, 1, pipe.mesh)
        condition = jax.eval_shape(lambda: pipe.conditioners[0].from_request(Request(prompt=""), target))
        features = condition.streams[TEXT].features
        shape = (batch_size, *features.shape[1:])
        return (jax.ShapeDtypeStruct(shape, features.dtype),), {"kind": "features", "shape": list(shape)}
    length = text.config.max_bytes + 1
    described = {"kind": "bytes", "length": length, "end": END, "padding": PADDING}
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    return (tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)), described


def _save_arrays(path: pathlib.Path, leaves: list[Array]) -> None:
    """Saves arrays in order. NumPy's format has no bfloat16: its bits are stored as 16-bit integers."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    plain = [x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for x in arrays]
    np.savez(path, allow_pickle=False, **{f"{index:05}": x for index, x in enumerate(plain)})


_SAMPLE = '''\
"""Runs the sampler in this folder with JAX alone: python sample.py "a prompt" [seed]

It needs JAX, NumPy (which JAX installs) and flatbuffers, the format of jax.export's files.

Writes video.npy: uint8 frames [clips, frames, height, width, 3].
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np

HERE = pathlib.Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text())


def load_weights():
    stored = np.load(HERE / "weights.npz")
    dtypes = map(jax.numpy.dtype, CONFIG["dtypes"])
    return [stored[name].view(dtype) for name, dtype in zip(sorted(stored), dtypes)]


def text_inputs(prompts):
    text = CONFIG["text"]
    if text["kind"] == "features":
        raise SystemExit(f"give features of the model's text encoder, of the shape {text['shape']}")
    tokens = np.full((len(prompts), text["length"]), text["padding"], np.int32)
    for row, prompt in zip(tokens, prompts):
        data = [*prompt.encode()[: text["length"] - 1], text["end"]]
        row[: len(data)] = data
    return tokens, tokens != text["padding"]


def main(prompt, seed=0):
    count = CONFIG["batch_size"]
    sampler = jax.export.deserialize((HERE / "sampler.bin").read_bytes())
    seeds = np.arange(int(seed), int(seed) + count, dtype=np.uint32)
    video = sampler.call(load_weights(), seeds, text_inputs([prompt] * count), text_inputs([""] * count))
    np.save("video.npy", np.asarray(video))


if __name__ == "__main__":
    main(*sys.argv[1:])
'''
