"""The whole of preflight on eight CPU devices, with the real 1.3B experiment shrunk: one compilation."""

import dataclasses
import json
import pathlib

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vidgen.cli import main as cli
from vidgen.cli import preflight as command
from vidgen.cli.overrides import load_config
from vidgen.core.config import resolve
from vidgen.core.tree import named_leaves
from vidgen.data.buckets import Bucket
from vidgen.data.latents_data import LatentsData
from vidgen.data.packing import PackingOptions
from vidgen.models.video_vae.config import VARIANTS
from vidgen.preflight import compile as compiling
from vidgen.preflight import report as reporting
from vidgen.preflight.compile import TooLarge, compile_step
from vidgen.preflight.layout import compare_layout
from vidgen.preflight.report import make_report
from vidgen.preflight.topology import Chip, PreflightError
from vidgen.train.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[2]
CONFIG, VAE = (f"{ROOT}/experiments/{name}.py:tiny" for name in ("dit/t2v_1b", "vae/wan"))
SMALL_VAE = dataclasses.replace(VARIANTS["tiny"], dim_mult=(1, 2), temporal_downsample=(True,), patch_size=4)
SMALL = ["--config.data.path=unread", "--config.task.dit.num_layers=1", "--config.data.num_frames=1"]


@pytest.fixture(scope="module")
def experiment():
    return resolve(Experiment, load_config(CONFIG, SMALL))


@pytest.fixture(scope="module")
def compiled(experiment):
    return compile_step(experiment, experiment.mesh.build(), SMALL_VAE)


def test_state_comes_out_as_asked(compiled):
    layout = compare_layout(compiled.state, compiled.executable.output_shardings[0])
    assert layout.moved == {}
    # Parameters, averages, and Adam's two moments of each.
    assert layout.num_arrays == layout.as_asked == 4 * len(named_leaves(compiled.state.params))
    assert layout.sharded_bytes > 0.9 * layout.total_bytes
    assert layout.per_chip_bytes < 0.25 * layout.total_bytes
    assert sum(layout.replicated.values()) == layout.total_bytes - layout.sharded_bytes
    assert not [name for name in layout.replicated if name.endswith("ffn.up.kernel")]


def test_moments_that_were_moved_are_named(compiled):
    name = "opt_state.0.mu.dit.blocks.ffn.up.kernel"
    found = compiled.executable.output_shardings[0]
    leaves, structure = jax.tree.flatten(found.opt_state)
    index = list(named_leaves(compiled.state.opt_state)).index(name.removeprefix("opt_state."))
    leaves[index] = NamedSharding(compiled.mesh, PartitionSpec())
    moved = dataclasses.replace(found, opt_state=jax.tree.unflatten(structure, leaves))
    layout = compare_layout(compiled.state, moved)
    assert list(layout.moved) == [name] and name in layout.replicated
    assert layout.as_asked == layout.num_arrays - 1
    asked, found = layout.moved[name].split(", found ")
    assert "fsdp" in asked and "fsdp" not in found


def test_report_adds_up(compiled, experiment):
    report = make_report(compiled, experiment, "eight CPUs")
    memory = report.memory
    assert report.ok and memory.fits and memory.available is None
    assert memory.peak >= memory.arguments + memory.temporaries
    # Parameters, averages and two moments, in float32.
    assert memory.arguments >= report.layout.per_chip_bytes >= 16 * report.parameters_per_chip
    assert report.num_parameters / 8 <= report.parameters_per_chip < report.num_parameters / 4
    assert report.frozen_parameters > 0 and report.batch["video"] == (8, 1, 16, 16, 3)
    assert report.collectives["all-gather"] > 0
    assert report.flops > 6 * 8 * 1 * report.num_parameters / 10


def command_line(monkeypatch, compiled, *options):
    monkeypatch.setattr(command, "prepare_environment", lambda: None)
    monkeypatch.setattr(command, "topology_devices", lambda name: jax.devices())
    asked = []
    monkeypatch.setattr(compiling, "compile_step", lambda *args: asked.append(args) or compiled)
    status = cli.main(["preflight", f"--config={CONFIG}", "--topology=v5e:4x2", *options])
    return status, asked


def test_command_prints_a_table_and_one_object(monkeypatch, capsys, compiled):
    status, [(experiment, mesh, vae)] = command_line(
        monkeypatch, compiled, f"--vae={VAE}", "--config.mesh.data=2", "--config.run.batch_size=16"
    )
    assert status == 0
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert experiment.run.batch_size == 16
    assert (vae.base_dim, vae.dtype) == (VARIANTS["tiny"].base_dim, "bfloat16")
    *table, last = capsys.readouterr().out.splitlines()
    values = json.loads(last)
    assert values["fits"] and values["ok"] and values["topology"] == "v5e:4x2"
    assert any(line.startswith("  peak") and line.endswith(": fits") for line in table)


def test_command_needs_the_shape_of_the_vae(monkeypatch, capsys, compiled):
    status, asked = command_line(monkeypatch, compiled, "--config.task.vae=absent")
    assert (status, asked) == (2, [])
    assert "config.task.vae: absent holds no VAE" in capsys.readouterr().err


def test_too_large_is_status_1_with_what_to_change(monkeypatch, capsys, compiled):
    chip = Chip(kind="cpu", hbm_bytes=1000, bf16_flops=1e12)
    monkeypatch.setattr(reporting, "chip_of", lambda device: chip)
    status, _ = command_line(monkeypatch, compiled, f"--vae={VAE}", "--json")
    assert status == 1
    [line] = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    assert not values["fits"] and values["memory"]["available"] == 1000
    assert any("--config.data.num_frames" in advice for advice in values["advice"])


def test_what_the_compiler_refuses_is_reported(monkeypatch, capsys, compiled):
    chip = Chip(kind="cpu", hbm_bytes=16 * 2**30, bf16_flops=1e12)
    monkeypatch.setattr(reporting, "chip_of", lambda device: chip)
    refused = dataclasses.replace(compiled, executable=TooLarge(needed_bytes=20 * 2**30, message="no"))
    status, _ = command_line(monkeypatch, refused, f"--vae={VAE}")
    assert status == 1
    out = capsys.readouterr().out
    assert "20.000 GiB of 16.000 GiB: DOES NOT FIT" in out and "to make it fit" in out
    assert json.loads(out.splitlines()[-1])["layout"] is None


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm.", 23.5),
        ("the total memory required for HLO temporaries (298.0G) exceeds available HBM (15.75G).", 298.0),
        ("INTERNAL: something else", None),
    ],
)
def test_errors_about_memory_are_read(message, gib):
    refusal = compiling._refusal(message)
    assert (refusal and refusal.needed_bytes / 2**30) == gib


def test_a_batch_that_does_not_divide_is_an_error(experiment):
    options = dataclasses.replace(experiment.run, batch_size=12, grad_accumulation=2)
    with pytest.raises(
        PreflightError, match=r"batch_size of 12 in 2 micro-batches .* make it a multiple of 16"
    ):
        compile_step(dataclasses.replace(experiment, run=options), experiment.mesh.build(), SMALL_VAE)


def test_of_several_buckets_those_that_could_need_the_most_memory_are_compiled(experiment):
    buckets = (
        Bucket(height=64, width=64, batch_size=8),
        Bucket(num_frames=5, height=32, width=32, batch_size=24),
        Bucket(num_frames=9, height=32, width=32),
    )
    data = dataclasses.replace(experiment.data, buckets=buckets)
    wide = dataclasses.replace(experiment, data=data)
    mesh = experiment.mesh.build()
    batches = compiling._abstract_batches(wide, experiment.task, mesh, VARIANTS["tiny"])
    # The images have fewer pixels, and more scores of attention.
    assert [batch.video.shape for batch in batches] == [(8, 1, 64, 64, 3), (24, 5, 32, 32, 3)]


def test_of_buckets_the_one_that_needs_the_most_is_reported(experiment, monkeypatch):
    """Of as many pixels in fewer frames: it has more tokens."""
    buckets = (
        Bucket(num_frames=9, height=16, width=16, batch_size=8),
        Bucket(height=32, width=64, batch_size=8),
        Bucket(height=16, width=16, batch_size=8),
    )
    sizes = []

    def refuse(traced):
        sizes.append(traced.args_info[0][2].video.shape)
        return TooLarge(needed_bytes=[3, 5][len(sizes) - 1], message="no")

    monkeypatch.setattr(compiling, "compile_or_refusal", refuse)
    data = dataclasses.replace(experiment.data, buckets=buckets)
    wide = dataclasses.replace(experiment, data=data)
    found = compile_step(wide, experiment.mesh.build(), SMALL_VAE)
    assert sizes == [(8, 9, 16, 16, 3), (8, 1, 32, 64, 3)]
    assert found.executable.needed_bytes == 5 and found.batch.video.shape == sizes[1]


def test_of_packed_clips_rows_are_compiled_and_shorter_ones_advised(experiment, compiled):
    packing = PackingOptions(tokens_per_row=48, clips_per_row=3)
    data = LatentsData(path="unread", packing=packing, clips=experiment.data)
    packed = dataclasses.replace(experiment, data=data)
    mesh = experiment.mesh.build()
    [batch] = compiling._abstract_batches(packed, experiment.task, mesh, VARIANTS["tiny"])
    dit, text = experiment.task.dit, experiment.task.text
    rows = experiment.run.batch_size
    assert batch.patches.shape == (rows, 48, 4 * dit.in_channels)
    tokens, mask = (batch.conditions[name] for name in ("tokens", "mask"))
    assert tokens.shape == mask.shape == (rows, 3, text.max_bytes + 1)
    assert batch.clip_ids.sharding.spec == batch.patches.sharding.spec
    advice = " ".join(reporting._advice(packed, compiled))
    assert "shorter rows: --config.data.packing.tokens_per_row (now 48)" in advice
