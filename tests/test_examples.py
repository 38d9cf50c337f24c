"""The examples of docs/extending.md: each is a short file, and runs."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidgen
from vidgen.cli import train
from vidgen.cli.overrides import load_config
from vidgen.core.config import resolve
from vidgen.core.errors import UserError
from vidgen.sampling.sampler import sample
from vidgen.sampling.time_grid import TimeGrid
from vidgen.train.experiment import Experiment, load_experiment

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_resolves(file):
    assert len(file.read_text().splitlines()) < 80
    assert isinstance(resolve(Experiment, load_config(str(file), [])), Experiment)


def train_example(name, workdir, *options):
    status = train.main([f"--config={FOLDER / name}.py", f"--workdir={workdir}", *options])
    assert not status
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["data", "task"])
def test_data_and_a_task_are_trained(name, tmp_path):
    lines = train_example(name, tmp_path, "--config.run.num_steps=1", "--config.run.eval_every=0")
    assert np.isfinite(lines[-1]["loss"])
    given, saved = resolve(Experiment, load_config(str(FOLDER / f"{name}.py"), [])), load_experiment(tmp_path)
    assert str(saved.task) == str(given.task) and str(saved.data) == str(given.data)


@pytest.mark.slow
def test_a_conditioner_is_trained_and_sampled_when_its_author_is_trusted(tiny_runs, tmp_path):
    train_example("conditioner", tmp_path, f"--config.task.vae={tiny_runs.vae}", "--config.run.eval_every=0")
    for module in [module for module in sys.modules if module.startswith("_vidgen_config_")]:
        del sys.modules[module]
    with pytest.raises(UserError, match=r"conditioner.py:MeanColour is a class of its author.*--trust"):
        vidgen.load(tmp_path)
    pipe = vidgen.load(tmp_path, trust=True)
    # Two steps from zero weights change no pixel.
    noisy = lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape)  # noqa: E731
    pipe.model = jax.tree.map(noisy, pipe.model)
    black, red = (pipe("a circle", steps=1, extras={"colour": c}) for c in ((0, 0, 0), (1, 0, 0)))
    assert black.shape == (5, 16, 16, 3) and (black != red).any()
    with pytest.raises(UserError, match="extras: no conditioner of the model reads 'color'"):
        pipe("a circle", extras={"color": (1, 0, 0)})


def test_a_stepper_and_a_guidance():
    stepper, guidance = (
        getattr(resolve(Experiment, load_config(str(FOLDER / f"{name}.py"), [])).task.sampling, name)
        for name in ("stepper", "guidance")
    )
    # dx/dt = x from t = 1 to 0 divides by e. Of second order: half the step, a quarter of the error.
    run = lambda n: float(  # noqa: E731
        sample(lambda x, _: x, jnp.ones((1, 1, 1)), grid=TimeGrid(num_steps=n), stepper=stepper)[0, 0, 0]
    )
    errors = [abs(run(n) - np.exp(-1.0)) for n in (20, 40)]
    assert 3.5 < errors[0] / errors[1] < 4.5
    positive, negative = jnp.full((1, 4, 2), 1.0), jnp.full((1, 4, 2), -1.0)
    combine = lambda scale: guidance.combine(  # noqa: E731
        positive, negative, latents=None, timestep=None, scale=scale, state=(), step=0
    )[0]
    np.testing.assert_allclose(combine(1.1), 1.2, rtol=1e-6)
    np.testing.assert_allclose(combine(9.0), 1.5, rtol=1e-6)
