"""Preflight of every experiment, with nothing of it on this machine: traced, and not compiled."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.cli.overrides import load_config
from vidgen.core.config import resolve
from vidgen.models.t5.config import VARIANTS as ENCODERS
from vidgen.models.t5.model import T5Encoder
from vidgen.models.video_vae.config import VARIANTS
from vidgen.preflight import compile as compiling
from vidgen.preflight import text_encoder
from vidgen.preflight.compile import TooLarge, compile_step
from vidgen.preflight.report import make_report
from vidgen.train import text_to_video_task
from vidgen.train.batch_spec import empty_batch
from vidgen.train.experiment import Experiment
from vidgen.train.text_features import TextFeatures
from vidgen.train.text_to_video_task import TextToVideoTask

ROOT = pathlib.Path(__file__).parents[2]
OF_WAN = ["lora", "ti2v", "t2v-low,lora", "i2v-high"]
OTHERS = [("dit/wan", argument) for argument in OF_WAN] + [("dit/t2v_1b", ""), ("dit/wan", "tiny")]
OTHERS += [("dit/folder", "stages,tiny"), ("dit/sprites", "tiny")]
OTHERS += [("vae/wan", "tiny"), ("vae/folder", "mixed,tiny"), ("vae/finetune", "tiny")]


def experiment_of(name, argument):
    overrides = ["--config.data.path=absent"] if name.split("/")[1] in ("wan", "folder", "t2v_1b") else []
    file = f"{ROOT}/experiments/{name}.py" + (f":{argument}" if argument else "")
    return resolve(Experiment, load_config(file, overrides))


@pytest.fixture(autouse=True)
def nothing_is_here(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("preflight has used the text encoder or the VAE")

    monkeypatch.setattr(TextFeatures, "features", fail)
    monkeypatch.setattr(text_to_video_task, "load_vae", fail)
    monkeypatch.setattr(
        compiling, "compile_or_refusal", lambda traced: TooLarge(needed_bytes=1, message="no")
    )


def report_of(name, argument):
    experiment = experiment_of(name, argument)
    vae = None
    if isinstance(experiment.task, TextToVideoTask):
        channels = experiment.task.dit.velocity_channels
        vae = next(vae for vae in VARIANTS.values() if vae.latent_channels == channels)
    mesh = experiment.mesh.build()
    return make_report(compile_step(experiment, mesh, vae), experiment, "eight CPUs")


@pytest.mark.parametrize(("name", "argument"), [("dit/wan", ""), ("dit/sprites", "packed,tiny")])
def test_no_file_is_needed(name, argument):
    report = report_of(name, argument)
    assert report.flops > 0 and report.num_parameters > 0
    has_encoder = (name, argument) == ("dit/wan", "")
    assert (report.memory.text_encoder > 0) == has_encoder
    if has_encoder:
        assert report.batch["conditions.text"] == report.batch["conditions.empty_text"] == (16, 1, 512, 4096)
        # 5.7 billion parameters of 16 bits over eight devices.
        assert 1.2 * 2**30 < report.memory.text_encoder < 1.5 * 2**30
        assert report.memory.peak == 1 + report.memory.text_encoder
        assert "text encoder" in report.table()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), OTHERS)
def test_no_file_is_needed_by_the_others(name, argument):
    assert report_of(name, argument).flops > 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoded", [False, True])
def test_the_spec_of_a_batch_is_that_of_its_arrays(monkeypatch, packed, encoded):
    experiment = experiment_of("dit/sprites", "packed,tiny" if packed else "tiny")
    task, data = experiment.task, experiment.data
    if encoded:
        task = dataclasses.replace(task, text_encoder=TextFeatures(path="absent", max_tokens=9))
        made = lambda _, captions: np.zeros((len(captions), 9, task.dit.text_dim), jnp.bfloat16)  # noqa: E731
        monkeypatch.setattr(TextFeatures, "features", made)
    spec, arrays = task.batch_spec(data, 1), task.arrays(empty_batch(data))
    assert spec == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    assert {x.shape[0] for x in jax.tree.leaves(task.batch_spec(data, 6))} == {6}


def test_the_encoder_is_that_of_the_folder_where_there_is_one(monkeypatch):
    experiment, small = experiment_of("dit/wan", ""), dataclasses.replace(ENCODERS["umt5-xxl"], num_layers=1)
    monkeypatch.setattr(text_encoder, "_config", lambda options: small)
    weights = jax.eval_shape(lambda: T5Encoder(small, rngs=compiling.nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(weights))
    found = text_encoder.encoder_bytes_of(experiment.task.text_encoder, experiment.mesh.build())
    assert 2 * count / 8 <= found < 2.02 * count / 8
