import dataclasses
import json
import pathlib
import textwrap

import pytest
from flax import nnx

from tests.models.random_weights import random_module
from vidgen.cli import train
from vidgen.cli.main import run
from vidgen.cli.overrides import load_config
from vidgen.core.config import ConfigError, resolve
from vidgen.core.errors import UserError
from vidgen.data.folder import FolderData
from vidgen.models.dit.config import DiTConfig
from vidgen.models.video_vae.config import VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.train import loop
from vidgen.train.experiment import Experiment, claim_workdir, load_experiment
from vidgen.train.interrupt import Stopped
from vidgen.train.optimizer import AdamW, Muon
from vidgen.train.options import RunOptions
from vidgen.train.resuming import MAY_CHANGE
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import save_vae
from vidgen.train.vae_task import VAETask


@pytest.fixture
def config(tmp_path):
    """An experiment file that trains nothing large, with an argument."""
    path = tmp_path / "experiment.py"
    path.write_text(
        textwrap.dedent("""
        from ml_collections import ConfigDict

        def get_config(arg=""):
            config = ConfigDict()
            config.task = dict(kind="vae", model=dict(base_dim=8, latent_channels=4))
            config.data = dict(kind="sprites", num_frames=5, height=16, width=16, num_clips=16)
            config.run = dict(num_steps=2, batch_size=8, log_every=1, seed=7 if arg == "seven" else 0)
            return config
        """)
    )
    return str(path)


@pytest.fixture
def fitted(monkeypatch):
    """What `fit` is called with, in the place of training."""
    calls = []
    monkeypatch.setattr(loop, "fit", lambda **arguments: calls.append(arguments))
    return calls


def test_overrides_are_literals_words_and_keys_that_the_file_leaves_out(config):
    values = load_config(
        f"{config}:seven",
        [
            "--config.run.num_steps=9",
            "--config.run.grad_clip=None",
            "--config.mesh.fsdp=2",
            "--config.data.split=all",
            "--config.data.backgrounds=('plain',)",
            "--config.optimizer.kind=muon",
        ],
    )
    experiment = resolve(Experiment, values)
    assert (experiment.run.num_steps, experiment.run.seed, experiment.run.grad_clip) == (9, 7, None)
    assert (experiment.mesh.fsdp, experiment.data.split, experiment.data.backgrounds) == (
        2,
        "all",
        ("plain",),
    )
    assert experiment.optimizer.kind == "muon"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--config.run.num_stpes=3",
            'config.run.num_stpes: unknown key "num_stpes" for RunOptions; did you mean "num_steps"',
        ),
        ("--config.optimiser.b1=0", 'did you mean "optimizer"'),
        ("--config.run.num_steps=many", "config.run.num_steps: found 'many' of type str, expected int"),
        ("--config.run.seed.x=1", "run.seed is the value 0"),
        (
            "--config.run.batch_size=0",
            "config.run.batch_size: found 0 of type int, expected a whole number from 1",
        ),
        ("--config.run.grad_accumulation=3", "does not divide run.batch_size 8"),
        ("--config.task.kind=vea", 'unknown value "vea"; did you mean "vae"'),
        ("--confg.run.seed=1", '"--confg.run.seed=1" is no option'),
    ],
)
def test_wrong_options_are_one_line_and_status_2(config, tmp_path, fitted, capsys, option, message):
    workdir = tmp_path / "w"
    assert run(train.main, [f"--config={config}", f"--workdir={workdir}", option]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not fitted and not workdir.exists()


def test_a_missing_config_file_is_an_error_that_names_it(tmp_path, capsys):
    assert run(train.main, [f"--config={tmp_path}/nope.py:tiny", f"--workdir={tmp_path}/w"]) == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "empty.py").write_text("")
    assert run(train.main, [f"--config={tmp_path}/empty.py", f"--workdir={tmp_path}/w"]) == 2
    assert "empty.py has no function get_config" in capsys.readouterr().err


def test_help_and_missing_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in ("--workdir", "--config.section.key=value", "--coordinator", "JAX_COMPILATION_CACHE_DIR"):
        assert words in text
    with pytest.raises(SystemExit) as stopped:
        train.main(["--workdir=w"])
    assert stopped.value.code == 2


def test_the_workdir_belongs_to_one_experiment(config, tmp_path, fitted, capsys):
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    assert run(train.main, command) == 0
    call = fitted[0]
    assert call["options"].batch_size == 8 and call["mesh"].size == 8
    assert call["resume_with"] == f"vidgen train {command[0]} {command[1]}"
    assert load_experiment(tmp_path / "w").task == call["task"]

    assert run(train.main, [*command, "--config.run.batch_size=16", "--config.task.kl_weight=1.0"]) == 2
    error = capsys.readouterr().err
    assert "run.batch_size 8 -> 16" in error and "task.kl_weight 0.0001 -> 1.0" in error
    assert len(fitted) == 1

    changes = ["--config.run.num_steps=5", "--config.run.log_every=2", "--config.mesh.fsdp=2"]
    assert run(train.main, [*command, *changes]) == 0
    assert load_experiment(tmp_path / "w").run.num_steps == 5


def test_folders_that_are_no_workdir_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: .* is not the workdir"):
        load_experiment(tmp_path)
    (tmp_path / "config.json").write_text('{"task": ')
    with pytest.raises(UserError, match=r"config\.json: not JSON .*: restore it"):
        load_experiment(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"task": {"kind": "vae"}, "dta": 1}))
    with pytest.raises(ConfigError, match='unknown key "dta"'):
        load_experiment(tmp_path)


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default(config, tmp_path):
    experiment = resolve(Experiment, load_config(config, []))
    claim_workdir(experiment, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["task"]["l1_weight"], values["task"]["adversary"], values["run"]["seed"]
    path.write_text(json.dumps(values))
    claim_workdir(experiment, tmp_path)
    path.write_text(json.dumps(values))
    other = resolve(Experiment, load_config(config, ["--config.task.l1_weight=0.5"]))
    with pytest.raises(ConfigError, match=r"task\.l1_weight 1\.0 -> 0\.5"):
        claim_workdir(other, tmp_path)


def test_only_the_main_process_writes_the_config(config, tmp_path):
    experiment = resolve(Experiment, load_config(config, []))
    claim_workdir(experiment, tmp_path / "w", write=False)
    assert not (tmp_path / "w").exists()


def bucketed(config, *buckets):
    return [f"--config={config}", f"--config.data.buckets={list(buckets)!r}", "--config.data.num_frames=5"]


def test_buckets_give_the_loader_batches_of_each_size(config, tmp_path, fitted, monkeypatch):
    given = []

    def fit(**arguments):
        given.extend(next(arguments["loader"])["video"].shape for _ in range(4))

    monkeypatch.setattr(loop, "fit", fit)
    sizes = ({"height": 8, "width": 16, "batch_size": 16}, {"num_frames": 5, "height": 16, "width": 8})
    assert run(train.main, [*bucketed(config, *sizes), f"--workdir={tmp_path / 'w'}"]) == 0
    assert sorted(given) == [(8, 5, 16, 8, 3)] * 2 + [(16, 1, 8, 16, 3)] * 2


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        (
            {"num_frames": 7, "height": 16, "width": 16},
            "config.data.buckets[1] (7 x 16 x 16): num_frames=7 is not 1 + 4 n; use 5 or 9",
        ),
        (
            {"num_frames": 5, "height": 16, "width": 20},
            "config.data.buckets[1] (5 x 16 x 20): width=20 is not a multiple of 8; use 16 or 24",
        ),
        (
            {"height": 16, "width": 16, "batch_size": 12},
            "config.data.buckets[1] (1 x 16 x 16): a batch of 12 rows (clips) does not divide over data * ",
        ),
    ],
)
def test_buckets_that_do_not_fit_are_named_before_anything_begins(
    config, tmp_path, fitted, capsys, bucket, message
):
    workdir = tmp_path / "w"
    command = [*bucketed(config, {"height": 16, "width": 16}, bucket), f"--workdir={workdir}"]
    assert run(train.main, command) == 2
    assert message in capsys.readouterr().err
    assert not fitted and not workdir.exists()


def test_sizes_without_buckets_and_of_previews_are_looked_at_too(config, tmp_path, fitted, capsys):
    workdir = f"--workdir={tmp_path / 'w'}"
    assert run(train.main, [f"--config={config}", workdir, "--config.data.height=12"]) == 2
    assert (
        "config.data (5 x 12 x 16): height=12 is not a multiple of 8; use 8 or 16" in capsys.readouterr().err
    )
    command = [*bucketed(config, {"height": 16, "width": 16}), "--config.data.height=12", workdir]
    assert run(train.main, command) == 2
    assert "config.data, whose own size is that of previews: height=12" in capsys.readouterr().err
    command = [*bucketed(config, {"height": 16, "width": 16, "batch_size": 8}), workdir]
    assert run(train.main, [*command, "--config.run.batch_size=48", "--config.run.grad_accumulation=3"]) == 2
    assert "batch_size is 8, which run.grad_accumulation 3 does not divide" in capsys.readouterr().err


def test_a_transformers_patches_and_tokens_count_for_its_sizes(tmp_path, capsys):
    save_vae(random_module(lambda: VideoVAE(VARIANTS["tiny"], rngs=nnx.Rngs(0))), tmp_path / "vae")
    config = pathlib.Path(__file__).parents[2] / "experiments" / "dit" / "sprites.py"
    command = [
        f"--config={config}:tiny",
        f"--workdir={tmp_path / 'w'}",
        f"--config.task.vae={tmp_path / 'vae'}",
    ]
    assert run(train.main, [*command, "--config.data.buckets=[{'height': 24, 'width': 16}]"]) == 2
    message = "config.data.buckets[0] (1 x 24 x 16): height=24 is not a multiple of 16; use 16 or 32"
    assert message in capsys.readouterr().err
    command += ["--config.data.buckets=[{'height': 32, 'width': 16}]", "--config.mesh.context=4"]
    assert run(train.main, command) == 2
    message = "a clip of 2 tokens does not divide over context = 4 devices: give the mesh context = 2, or"
    assert f"config.data.buckets[0] (1 x 32 x 16): {message}" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_options_newer_than_the_run_have_their_defaults(config, tmp_path, fitted):
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    assert run(train.main, command) == 0
    path = tmp_path / "w" / "config.json"
    values = json.loads(path.read_text())
    del values["data"]["buckets"]
    path.write_text(json.dumps(values))
    assert run(train.main, command) == 0
    assert len(fitted) == 2 and json.loads(path.read_text())["data"]["buckets"] == []


def test_what_may_change_is_logged_and_other_keys_may_not(config, tmp_path, fitted, capsys, caplog):
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    command.append("--config.optimizer.kind=adamw")
    assert run(train.main, command) == 0
    changes = ["optimizer.learning_rate=1e-5", "run.grad_clip=0.5", "run.skip_steps=[[1,2]]", "mesh.fsdp=2"]
    caplog.clear()
    assert run(train.main, [*command, *(f"--config.{change}" for change in changes)]) == 0
    assert "optimizer.learning_rate 0.0003 -> 1e-05" in caplog.text
    assert "run.grad_clip 1.0 -> 0.5" in caplog.text
    assert fitted[-1]["options"].skip_steps == ((1, 2),) and fitted[-1]["optimizer"].learning_rate == 1e-5
    for refused in ("run.grad_accumulation=2", "optimizer.weight_decay=0.5", "run.ema_decay=0.5"):
        assert run(train.main, [*command, f"--config.{refused}"]) == 2
        assert f"{refused.partition('=')[0]} " in capsys.readouterr().err


def test_every_key_that_may_change_is_one_of_an_experiment():
    options = (Experiment, RunOptions, TextToVideoTask, VAETask, FolderData, AdamW, Muon, DiTConfig)
    known = {field.name for cls in options for field in dataclasses.fields(cls)}
    known |= {"path", "cache", "clips", "every", "sequence"}
    for key in MAY_CHANGE:
        assert set(key.removesuffix(".*").split(".")) <= known, key


def test_the_schedule_of_the_learning_rate_stays_when_a_run_is_made_longer(config, tmp_path, fitted, caplog):
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    assert run(train.main, command) == 0
    assert run(train.main, [*command, "--config.run.num_steps=9"]) == 0
    assert fitted[-1]["options"].num_steps == 9 and fitted[-1]["options"].schedule_length == 2
    assert "stops after step 9; its learning rate rises and falls over 2 (run.schedule_steps)" in caplog.text
    longer = [*command, "--config.run.num_steps=9", "--config.run.schedule_steps=9"]
    assert run(train.main, longer) == 0
    assert fitted[-1]["options"].schedule_length == 9
    assert run(train.main, [*command, "--config.run.num_steps=9"]) == 0
    assert fitted[-1]["options"].schedule_length == 9


def test_checkpoints_without_their_config_are_not_gone_on_with(config, tmp_path, fitted, capsys):
    (tmp_path / "w" / "checkpoints" / "4").mkdir(parents=True)
    assert run(train.main, [f"--config={config}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "config.json is missing, and " in capsys.readouterr().err and not fitted


def test_micro_batches_have_to_divide_over_the_devices(config, tmp_path, fitted, capsys):
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}", "--config.run.grad_accumulation=4"]
    assert run(train.main, command) == 2
    message = "a batch of 8 rows (clips) in 4 micro-batches does not divide over data * fsdp = 8 devices: "
    assert message + "make batch_size a multiple of 32" in capsys.readouterr().err and not fitted
    assert run(train.main, [*command, "--config.run.batch_size=32"]) == 0


def test_a_stop_before_the_first_step_is_a_line_and_a_status(config, tmp_path, monkeypatch, capsys):
    def fit(**_):
        raise Stopped("stopped before the first step")

    monkeypatch.setattr(loop, "fit", fit)
    assert run(train.main, [f"--config={config}", f"--workdir={tmp_path / 'w'}"]) == 143
    assert capsys.readouterr().err.endswith("vidgen: stopped before the first step\n")
