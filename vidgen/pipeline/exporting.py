"""Exports trained runs and checkpoints to file formats of other programs."""

import pathlib
from typing import Literal

import jax
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from vidgen.ckpt.json_files import write_json
from vidgen.ckpt.weights import save_weights
from vidgen.core.config import to_dict
from vidgen.core.errors import UserError
from vidgen.core.files import check_target
from vidgen.core.tree import named_leaves
from vidgen.models.dit.diffusers_folder import save_diffusers
from vidgen.models.dit.experts import NoiseLevelExperts
from vidgen.models.dit.lora_file import Spelling, save_lora
from vidgen.models.dit.model import DiT
from vidgen.models.dit.wan_file import save_wan
from vidgen.models.text.model import ByteEncoder
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae import diffusers_folder as vae_folder
from vidgen.models.video_vae.model import VideoVAE
from vidgen.models.video_vae.params import wan_names
from vidgen.nn.lora import merge_low_rank
from vidgen.pipeline.diffusers_folder import INDEX, is_checkpoint, load_transformers, read_index
from vidgen.pipeline.importing import import_checkpoint, new_folder
from vidgen.pipeline.parts import copy_part
from vidgen.pipeline.sampling_file import read_defaults, write_defaults, write_scheduler
from vidgen.sampling.conditioners import ConcatFrames, FirstFrame
from vidgen.sampling.published import SamplingDefaults
from vidgen.train.restore import load_run
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import load_vae

__all__ = ["Format", "export"]

Format = Literal["diffusers", "safetensors", "orbax", "lora"]


def export(
    source: pathlib.Path | str,
    target: pathlib.Path | str,
    format: Format = "diffusers",
    *,
    mesh: Mesh,
    step: int | None = None,
    spelling: Spelling = "peft",
) -> None:
    """Writes a model for other programs; `target` is written atomically.

    - `diffusers`: a folder with `transformer`, `vae`, `scheduler` and the text encoder. A byte encoder is
      written to `byte_encoder`, which diffusers ignores: there the model takes prompt features, without the
      padding after the prompt. `sampling.json`, which diffusers ignores too, has the size, the frame rate and
      the sampling options, so that `vidgen.load` samples from the export as from the run.
    - `safetensors`: one file per part, with the tensor names of Wan's own checkpoints, as ComfyUI reads them,
      and `sampling.json`.
    - `orbax`: a pytree of arrays under vidgen's names, and `sampling.json`.
    - `lora`: the LoRA weights of a run with `task.lora`, in one file.

    All formats except `lora` merge LoRA weights into the model's weights.

    Args:
      source: workdir of a text-to-video run (its averaged weights), or a checkpoint in diffusers' layout.
      step: checkpoint of the run; None is the newest.
      spelling: naming scheme of a LoRA file's tensors.

    Raises:
      FileNotFoundError: `source` is neither.
      UserError: the format cannot hold the model, or `target` is not empty.
    """
    check_target(target, folder=format != "lora")
    if is_checkpoint(source) and format == "diffusers":
        import_checkpoint(source, target, mesh=mesh)
        return
    model, vae, task, defaults = _parts(source, mesh, step)
    if format == "lora":
        save_lora(_single(model), target, spelling)
        return
    merge_low_rank(model)
    if model.dit.config.streams and format != "orbax":
        raise UserError(
            f"{format} cannot hold the transformer's streams, which other programs do not know "
            f"({', '.join(stream.name for stream in model.dit.config.streams)}): use the format orbax"
        )
    with new_folder(target) as folder:
        write_defaults(folder, defaults)
        if format == "diffusers":
            _write_diffusers(model, vae, task, defaults, folder)
        elif format == "safetensors":
            _write_files(model, vae, folder)
        else:
            _write_orbax(model, vae, folder)


def _parts(
    source: pathlib.Path | str, mesh: Mesh, step: int | None
) -> tuple[TextToVideo, VideoVAE, TextToVideoTask | None, SamplingDefaults]:
    """The model, its VAE, the task that trained it (None for a checkpoint) and its sampling defaults."""
    if is_checkpoint(source):
        vae = vae_folder.load_diffusers(pathlib.Path(source) / "vae")
        dit = load_transformers(source, mesh)
        defaults = read_defaults(source, dit.config, vae.config, experts=isinstance(dit, NoiseLevelExperts))
        return TextToVideo(dit), vae, None, defaults
    experiment, _, model = load_run(source, mesh, step=step)
    if not isinstance(model, TextToVideo):
        raise UserError(
            f"{source} is a run of kind {experiment.task.kind!r}; only runs of kind 'text_to_video' can be "
            "exported (a VAE's weights are in its run's folder `vae`)"
        )
    assert isinstance(experiment.task, TextToVideoTask)
    data = experiment.data
    defaults = SamplingDefaults(
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        fps=data.fps,
        options=experiment.task.sampling_options(),
    )
    return model, load_vae(source), experiment.task, defaults


def _single(model: TextToVideo) -> DiT:
    if not isinstance(model.dit, DiT):
        raise UserError("the model has two transformers; this format holds one")
    return model.dit


def _write_diffusers(
    model: TextToVideo,
    vae: VideoVAE,
    task: TextToVideoTask | None,
    defaults: SamplingDefaults,
    folder: pathlib.Path,
) -> None:
    dit = _single(model)
    kinds = [type(conditioner) for conditioner in (() if task is None else task.conditioners)]
    save_diffusers(dit, folder / "transformer")
    vae_folder.save_diffusers(vae, folder / "vae")
    index = {
        "_class_name": "WanImageToVideoPipeline" if {FirstFrame, ConcatFrames} & {*kinds} else "WanPipeline",
        "expand_timesteps": FirstFrame in kinds,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": write_scheduler(folder, defaults, dit.config, vae.config),
    }
    if model.text is not None:
        _write_bytes(model.text, folder / "byte_encoder")
    if task is not None and task.text_encoder is not None:
        encoder = pathlib.Path(task.text_encoder.path)
        for name in ("text_encoder", "tokenizer"):
            copy_part(encoder / name, folder / name)
        source = read_index(encoder) if is_checkpoint(encoder) else {}
        index["text_encoder"] = source.get("text_encoder", ["transformers", "UMT5EncoderModel"])
        index["tokenizer"] = source.get("tokenizer", ["transformers", "T5TokenizerFast"])
    write_json(folder / INDEX, index)


def _write_bytes(text: ByteEncoder, folder: pathlib.Path) -> None:
    save_weights(folder / "model.safetensors", nnx.state(text, nnx.Param, graph=False))
    write_json(folder / "config.json", to_dict(text.config))


def _write_files(model: TextToVideo, vae: VideoVAE, folder: pathlib.Path) -> None:
    save_wan(_single(model), folder / "transformer.safetensors")
    params = nnx.state(vae, nnx.Param, graph=False)
    names = wan_names(vae.config, named_leaves(params))
    save_weights(folder / "vae.safetensors", params, names=names, metadata={"format": "pt"})
    if model.text is not None:
        _write_bytes(model.text, folder / "byte_encoder")


def _write_orbax(model: TextToVideo, vae: VideoVAE, folder: pathlib.Path) -> None:
    trees = {"model": model, "vae": vae}
    arrays = {
        name: {path: jax.numpy.asarray(leaf) for path, leaf in named_leaves(nnx.state(tree)).items()}
        for name, tree in trees.items()
    }
    ocp.save(str((folder / "weights").absolute()), arrays)
    configs = {"dit": model.dit.config, "vae": vae.config}
    configs |= {} if model.text is None else {"text": model.text.config}
    write_json(folder / "config.json", {name: to_dict(config) for name, config in configs.items()})
