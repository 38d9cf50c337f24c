"""A task of two phases: a generator in each step, a critic in every second one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train import toy
from vidgen.core.tree import named_leaves
from vidgen.nn.variables import Buffer, param
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.optimizer import AdamW
from vidgen.train.phases import due, transformation
from vidgen.train.task import Phase

CRITIC = AdamW(learning_rate=3e-2, warmup_steps=1, weight_decay=0.0)


class Pair(nnx.Module):
    def __init__(self, rngs):
        normal = jax.nn.initializers.normal(0.3)
        self.generator = nnx.Dict(scale=param(rngs, normal, (toy.DIM,), (None,)))
        self.critic = nnx.Dict(weight=param(rngs, normal, (toy.DIM,), (None,)))
        self.seen = Buffer(jnp.zeros(()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPhases(toy.ToyTask):
    every: int = 2

    def build(self, rngs):
        return Pair(rngs)

    @property
    def phases(self):
        return (
            Phase(name="generator", loss=self.generate, optimizers={"generator": None}),
            Phase(name="critic", loss=self.judge, optimizers={"critic": CRITIC}, every=self.every),
        )

    def generate(self, context):
        context.model.seen[...] = context.model.seen[...] + 1
        critic = context.model.critic["weight"][...]  # Its gradient here must not reach it.
        loss = jnp.square(self.made(context) @ critic[:, None] - 1).mean()
        return loss, {"scale": context.model.generator["scale"][...].mean()}

    def judge(self, context):
        averaged = context.ema.critic["weight"][...]
        critic = context.model.critic["weight"][...]
        return jnp.square(critic - 0.5).sum() + jnp.square(self.made(context) @ critic[:, None]).mean(), {
            "lag": jnp.square(critic - averaged).sum()
        }

    def made(self, context):
        video = context.batch["video"]
        x = video.reshape(len(video), toy.DIM).astype(jnp.float32) / 255
        return x * context.model.generator["scale"][...][None]

    def finish(self, model, *, step, workdir, open_clips, mesh):
        pass


def numbers(tree):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def parts(state):
    return {name: numbers(getattr(state, name)) for name in ("params", "ema", "buffers", "opt_state")}


def test_each_phase_moves_its_parameters_when_it_is_due(tmp_path):
    states = [parts(toy.train(tmp_path / str(n), task=TwoPhases(), num_steps=n)) for n in (1, 2, 3)]
    for before, after, moves in ((0, 1, False), (1, 2, True)):
        a, b = states[before]["params"], states[after]["params"]
        assert np.any(a["generator.scale"] != b["generator.scale"])
        assert np.any(a["critic.weight"] != b["critic.weight"]) == moves
    counts = {n: v for n, v in states[2]["opt_state"].items() if n.endswith("count")}
    assert {int(v) for n, v in counts.items() if "generator" in n} == {3}
    assert {int(v) for n, v in counts.items() if "critic" in n} == {2}
    lines = toy.metrics(tmp_path / "3")
    assert ["critic/loss" in line for line in lines] == [True, False, True]
    assert ["grad_norm/critic" in line for line in lines] == [True, False, True]
    assert all(line["loss"] == line["generator/loss"] for line in lines)
    assert lines[2]["critic/lag"] > 0 and "generator/scale" in lines[1]


def test_means_are_over_the_steps_that_have_a_metric(tmp_path):
    toy.train(tmp_path / "each", task=TwoPhases(), num_steps=4)
    toy.train(tmp_path / "mean", task=TwoPhases(), num_steps=4, log_every=4)
    each, [mean] = toy.metrics(tmp_path / "each"), toy.metrics(tmp_path / "mean")
    expected = np.mean([line["critic/loss"] for line in each if "critic/loss" in line])
    assert mean["critic/loss"] == pytest.approx(expected, rel=1e-6)
    assert mean["loss"] == pytest.approx(np.mean([line["loss"] for line in each]), rel=1e-6)


def test_a_run_of_two_phases_resumes_bit_exactly(tmp_path):
    whole = toy.train(tmp_path / "whole", task=TwoPhases(), num_steps=6, schedule_steps=6)
    options = {"task": TwoPhases(), "schedule_steps": 6, "checkpoint_every": 3}
    toy.train(tmp_path / "parts", num_steps=3, **options)
    again = toy.train(tmp_path / "parts", num_steps=6, **options)
    for name, found in parts(again).items():
        for key, value in parts(whole)[name].items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{name}.{key}")
    assert toy.losses(tmp_path / "parts") == toy.losses(tmp_path / "whole")


def test_accumulation_and_the_mesh_change_nothing(tmp_path):
    plain = parts(toy.train(tmp_path / "plain", task=TwoPhases(), num_steps=3))["params"]
    mesh = MeshOptions(data=2, fsdp=2, tensor=2).build()
    options = {"grad_accumulation": 2, "mesh": mesh}
    found = parts(toy.train(tmp_path / "parts", task=TwoPhases(), num_steps=3, **options))["params"]
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_averages_of_another_width_cover_both_phases(tmp_path):
    from vidgen.train.power_law import PowerLaw

    power_law = PowerLaw(sigma_rels=(0.1,), every=2)
    state = toy.train(tmp_path, task=TwoPhases(), num_steps=2, power_law=power_law)
    assert set(numbers(state.opt_state.averages[0])) == {"generator.scale", "critic.weight"}
    assert len(list((tmp_path / "averages").glob("*.safetensors"))) == 1


def test_phases_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="the first phase take part in every step"):
        transformation(TwoPhases().phases[::-1], AdamW(), 10)
    with pytest.raises(ValueError, match="names and submodules must differ"):
        transformation((Phase(loss=print), Phase(loss=print, name="b")), AdamW(), 10)


def test_which_phases_are_due():
    phases = TwoPhases(every=3).phases
    assert [due(phases, step) for step in (0, 1, 3)] == [
        ("generator", "critic"),
        ("generator",),
        ("generator", "critic"),
    ]
