"""Every experiment resolves, as written and as ":tiny". Training them is tested with the runner."""

import dataclasses
import importlib
import inspect
import math
import pathlib

import ml_collections
import pytest

from vidgen.core.config import ConfigError, resolve, to_dict
from vidgen.train.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").glob("*/*.py")
    if not path.name.startswith("_")
)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_how_to_run_it(name):
    module = importlib.import_module(f"vidgen.{name}")
    path = name.replace(".", "/") + ".py"
    assert f"--config={path}" in (inspect.getdoc(module) or ""), f"{path}: the docstring gives no command"


MIXED = [("experiments.vae.folder", argument) for argument in ("mixed", "mixed,tiny", "mixed,small-8x16x16")]
MIXED += [("experiments.dit.sprites", argument) for argument in ("packed", "packed,tiny")]
MIXED += [("experiments.dit.folder", argument) for argument in ("mixed", "stages", "stages,tiny")]
MIXED += [
    ("experiments.dit.wan", argument)
    for argument in ("lora", "ti2v", "t2v-high", "t2v-low,lora", "i2v-high", "i2v-low", "i2v-low,tiny")
]


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in NAMES for argument in (None, "tiny")] + MIXED
)
def test_get_config_gives_values_that_resolve(name, argument):
    module = importlib.import_module(f"vidgen.{name}")
    config = module.get_config() if argument is None else module.get_config(argument)
    assert isinstance(config, ml_collections.ConfigDict)
    if config.data.kind == "folder":
        with pytest.raises(ConfigError, match=r"config\.data\.path"):
            resolve(Experiment, config.to_dict())
        config.data.path = "clips"
    values = config.to_dict()
    assert not [value for value in leaves(values) if dataclasses.is_dataclass(value) or callable(value)]
    experiment = resolve(Experiment, values)
    assert resolve(Experiment, to_dict(experiment)) == experiment


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_differs_and_unknown_arguments_are_errors(name):
    module = importlib.import_module(f"vidgen.{name}")
    assert str(module.get_config("tiny")) != str(module.get_config())
    with pytest.raises(ValueError, match="tiny"):
        module.get_config("no-such-argument")


@pytest.mark.parametrize("argument", ["", "decoder", "images", "demo", "decoder,tiny"])
def test_finetuning_takes_the_arguments_of_what_it_continues(argument):
    from vidgen.experiments.vae import finetune, sprites

    experiment = resolve(Experiment, finetune.get_config(argument).to_dict())
    base = sprites.get_config(argument.replace("decoder", "").strip(",")).to_dict()
    assert experiment.task.train == ("decoder" if "decoder" in argument else "all")
    assert experiment.task.model == resolve(Experiment, base).task.model
    assert experiment.data == resolve(Experiment, base).data
    assert 0 < experiment.task.adversary.start_step < experiment.run.num_steps
    frame = min(experiment.data.height, experiment.data.width)
    assert frame >= experiment.task.adversary.discriminator.spatial_factor


def test_packed_has_the_model_and_the_tokens_of_the_run_that_it_is_compared_with():
    from vidgen.experiments.dit import sprites
    from vidgen.models.video_vae.config import VARIANTS

    packed, fixed = (resolve(Experiment, sprites.get_config(name).to_dict()) for name in ("packed", ""))
    assert (packed.task.dit, packed.task.text, packed.optimizer) == (
        fixed.task.dit,
        fixed.task.text,
        fixed.optimizer,
    )
    assert dataclasses.replace(packed.data.clips, buckets=()) == fixed.data
    assert packed.run == dataclasses.replace(fixed.run, batch_size=packed.run.batch_size)
    data = fixed.data
    grid = fixed.task.dit.token_grid(
        *VARIANTS["nano"].latent_shape(data.num_frames, data.height, data.width)[:3]
    )
    tokens = fixed.run.batch_size * fixed.task.draws_per_clip * math.prod(grid)
    assert packed.run.batch_size * packed.data.packing.tokens_per_row == tokens == 1536
    assert sum(bucket.weight for bucket in packed.data.clips.buckets) == pytest.approx(1.0)
    for bucket in packed.data.clips.buckets:
        VARIANTS["nano"].latent_shape(bucket.num_frames, bucket.height, bucket.width)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("experiments.dit.sprites", "packed,demo"), ("experiments.dit.folder", "packed")],
)
def test_arguments_that_do_not_go_together_are_errors(name, argument):
    with pytest.raises(ValueError, match=r"exclude each other|unknown argument 'packed'"):
        importlib.import_module(f"vidgen.{name}").get_config(argument)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.fps", float("inf")),
        ("data.fps", 0.0),
        ("data.height", 1_000_000),
        ("data.num_frames", 0),
        ("data.num_frames", 10**7),
        ("run.batch_size", 10**9),
        ("run.num_steps", 0),
        ("run.num_threads", -1),
        ("run.ema_decay", 1.5),
        ("run.grad_clip", float("nan")),
        ("run.keep_every", 0),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_key(key, value):
    from vidgen.experiments.vae import sprites

    values = sprites.get_config("tiny").to_dict()
    section, name = key.split(".")
    values[section][name] = value
    with pytest.raises(ConfigError, match=rf"config\.{section}\.{name}: found .* expected .*number"):
        resolve(Experiment, values)
