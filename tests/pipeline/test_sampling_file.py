"""Options of sampling travel: from training to runs, previews, exports, and back."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

import vidgen
from vidgen.cli import evaluators
from vidgen.core.config import ConfigError, resolve, to_dict
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.diffusion.shift import RootShift
from vidgen.diffusion.timesteps import LogitNormal
from vidgen.models.dit.config import VARIANTS
from vidgen.models.text_to_video import TextToVideo
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.parallel.mesh import MeshOptions
from vidgen.pipeline.exporting import export
from vidgen.pipeline.sampling_file import (
    copy_sampling,
    read_defaults,
    read_scheduler,
    write_defaults,
    write_scheduler,
)
from vidgen.sampling.guidance import AdaptiveProjected
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.published import PUBLISHED, SamplingDefaults
from vidgen.sampling.steppers import UniPC
from vidgen.sampling.time_grid import TimeGrid
from vidgen.train.text_to_video_task import TextToVideoTask

VAE = VAE_VARIANTS["wan2.1"]
DIT = VARIANTS["wan2.1-t2v-1.3b"]
OPTIONS = SamplingOptions(
    grid=TimeGrid(num_steps=2, shift=3.0, convention="wan"),
    stepper=UniPC(),
    guidance_scale=2.5,
    guidance=AdaptiveProjected(norm_threshold=15.0),
    guidance_interval=(0.1, 0.9),
)
DEFAULTS = SamplingDefaults(num_frames=9, height=64, width=64, fps=8.0, options=OPTIONS)


def scheduler(folder, **values):
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return folder


def unipc(folder, shift):
    kind = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    return scheduler(folder, **kind, use_flow_sigmas=True, flow_shift=shift)


@pytest.mark.parametrize(
    ("variant", "in_folder", "steps", "shift", "scales"),
    [
        ("wan2.1-t2v-1.3b", 3.0, 50, 3.0, (5.0, None)),
        ("wan2.1-t2v-14b", 8.0, 50, 8.0, (5.0, None)),
        ("wan2.1-i2v-14b", 3.0, 40, 3.0, (5.0, None)),
        ("wan2.1-flf2v-14b", 16.0, 50, 16.0, (5.0, None)),
        ("wan2.2-ti2v-5b", 5.0, 50, 5.0, (5.0, None)),
        ("wan2.2-t2v-a14b", 3.0, 40, 12.0, (4.0, 3.0)),
        ("wan2.2-t2v-a14b", 7.0, 40, 7.0, (4.0, 3.0)),
        ("wan2.2-i2v-a14b", 3.0, 40, 5.0, (3.5, 3.5)),
    ],
)
def test_open_weights_are_sampled_as_published(tmp_path, variant, in_folder, steps, shift, scales):
    """Of a folder that diffusers wrote: its shift, but for the 3 that is in all of two transformers."""
    large = variant == "wan2.2-ti2v-5b"
    vae, experts = VAE_VARIANTS["wan2.2" if large else "wan2.1"], variant.endswith("a14b")
    found = read_defaults(unipc(tmp_path, in_folder), VARIANTS[variant], vae, experts=experts)
    assert (found.size, found.fps) == (((121, 704, 1280), 24.0) if large else ((81, 480, 832), 16.0))
    assert found.options == SamplingOptions(
        grid=TimeGrid(num_steps=steps, shift=shift, convention="unipc"),
        stepper=UniPC(),
        guidance_scale=scales[0],
        guidance_scale_2=scales[1],
    )


def test_every_transformer_of_wan_has_its_options():
    assert PUBLISHED.keys() == {name for name in VARIANTS if name.startswith("wan")}


@pytest.mark.parametrize("options", [OPTIONS, SamplingOptions(grid=TimeGrid(shift=RootShift(base_tokens=9)))])
def test_what_is_written_is_read(tmp_path, options, caplog):
    defaults = dataclasses.replace(DEFAULTS, options=options)
    write_defaults(tmp_path, defaults)
    assert write_scheduler(tmp_path, defaults, DIT, VAE)[0] == "diffusers"
    (tmp_path / "copy").mkdir()
    copy_sampling(tmp_path, tmp_path / "copy")
    shutil.copytree(tmp_path / "scheduler", tmp_path / "copy" / "scheduler")
    for folder in (tmp_path, tmp_path / "copy"):
        assert read_defaults(folder, DIT, VAE, experts=False) == defaults
    assert caplog.text == ""
    # 3 x 4 x 4 tokens; a scheduler that somebody changed is not followed in silence.
    shift = 3.0 if options is OPTIONS else (48 / 9) ** 0.5
    assert read_scheduler(tmp_path / "scheduler").grid.shift == pytest.approx(shift)
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        assert read_defaults(unipc(tmp_path, 8.0), DIT, VAE, experts=False) == defaults
    assert "has a shift of 8, sampling.json one of" in caplog.text


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fps",), 0.0),
        (("height",), 10**9),
        (("options", "grid", "num_steps"), 0),
        (("options", "grid", "shift"), -1.0),
        (("options", "guidance_scale"), "high"),
        (("options", "stepper"), {"kind": "unknown"}),
    ],
)
def test_a_file_with_absurd_values(tmp_path, place, value):
    values = to_dict(DEFAULTS)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (unipc(tmp_path, 3.0) / "sampling.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"sampling\.json\." + r"\.".join(place)):
        read_defaults(tmp_path, DIT, VAE, experts=False)


@pytest.mark.parametrize("shift", [0, -1, "3", None, 1e9])
def test_a_scheduler_with_an_absurd_shift(tmp_path, shift):
    with pytest.raises(UserError, match=r"scheduler_config\.json: flow_shift: found .*, expected a number"):
        read_scheduler(unipc(tmp_path, shift) / "scheduler")


def task(**options):
    return TextToVideoTask(vae="unused", **options)


def test_the_shift_is_that_of_training_where_none_is_named():
    root = RootShift(base_tokens=9)
    for shift in (3.0, root):
        found = task(density=LogitNormal(shift=shift)).sampling_options()
        assert found == SamplingOptions(grid=TimeGrid(shift=shift))
    # Other options leave it so; a shift that is named counts.
    values = {"guidance_scale": 2.0, "grid": {"num_steps": 9}}
    some = resolve(
        TextToVideoTask, {"vae": "x", "density": {"kind": "uniform", "shift": 5.0}, "sampling": values}
    )
    assert some.sampling_options().grid == TimeGrid(num_steps=9, shift=5.0)
    assert some.sampling_options().guidance_scale == 2.0
    assert task(density=LogitNormal(shift=3.0), sampling=OPTIONS).sampling_options() == OPTIONS


def test_previews_are_sampled_as_the_model_is(monkeypatch):
    seen = []

    def pipeline(*_, options, **__):
        seen.append(options)
        return lambda prompts: np.zeros((len(prompts), 1, 4, 4, 3), np.uint8)

    monkeypatch.setattr(evaluators, "Pipeline", pipeline)
    clips = [{"caption": "a", "video": np.zeros((1, 4, 4, 3), np.uint8)}]
    made = task(density=LogitNormal(shift=3.0), sampling=SamplingOptions(guidance_scale=6.0))
    previews = evaluators.RunPreviews(clips=clips, every=1, fps=8.0, mesh=MeshOptions().build())
    (preview,) = made.evaluators(previews)
    preview.sample(object.__new__(TextToVideo), object.__new__(VideoVAE), ("a",))
    assert seen == [SamplingOptions(grid=TimeGrid(shift=3.0), guidance_scale=6.0)]


def test_a_run_that_is_exported_and_loaded_again_is_sampled_alike(tiny_runs, tmp_path):
    """Size, rate, options, and the video itself."""
    run, mesh = tmp_path / "run", MeshOptions().build(jax.devices()[:1])
    shutil.copytree(tiny_runs.dit, run)
    config = read_json(run / "config.json", remedy="")
    config["task"]["sampling"] = to_dict(OPTIONS)
    (run / "config.json").write_text(json.dumps(config))
    export(run, tmp_path / "out", mesh=mesh)
    first, again = vidgen.load(run, mesh=mesh), vidgen.load(tmp_path / "out", mesh=mesh)
    assert (first.size, first.fps, first.options) == ((5, 16, 16), 8.0, OPTIONS)
    assert (again.size, again.fps, again.options) == (first.size, first.fps, first.options)
    np.testing.assert_array_equal(again("a red circle"), first("a red circle"))
    index = read_json(tmp_path / "out" / "model_index.json", remedy="")
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    # A run of before there were such options.
    del config["task"]["sampling"]
    config["task"]["density"]["shift"] = 5.0
    (run / "config.json").write_text(json.dumps(config))
    assert vidgen.load(run, mesh=mesh).options == SamplingOptions(grid=TimeGrid(shift=5.0))
