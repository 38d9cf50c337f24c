"""Snapshots that a run writes, and what is made of them."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

from tests.train import toy
from vidgen.core.errors import UserError
from vidgen.core.tree import named_leaves
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.power_law import PowerLaw
from vidgen.train.snapshots import SnapshotError, averaged_weights
from vidgen.train.state import abstract_state

OPTIONS = PowerLaw(sigma_rels=(0.1, 0.2), every=5)


@pytest.fixture(scope="module")
def abstract():
    return abstract_state(toy.ToyTask(), optax.identity(), MeshOptions(fsdp=2).build(jax.devices()[:2]))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir, and the state after 12 steps."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, toy.train(workdir, power_law=OPTIONS, keep=3)


def assert_equal(tree, other, **tolerance):
    for name, leaf in named_leaves(tree).items():
        np.testing.assert_allclose(leaf, named_leaves(other)[name], **{"rtol": 0, "atol": 0} | tolerance)


def test_the_averages_that_were_kept_come_back(trained, abstract):
    workdir, state = trained
    names = sorted(path.name for path in (workdir / "averages").glob("*.json"))
    assert names == ["step_0000005.json", "step_0000010.json", "step_0000012.json"]
    for sigma_rel, average in zip(OPTIONS.sigma_rels, state.opt_state.averages, strict=True):
        step, found = averaged_weights(workdir, abstract.params, sigma_rel)
        assert step == 12
        assert_equal(found, average, rtol=1e-5, atol=1e-6)
        assert found["up"].sharding.is_equivalent_to(abstract.params["up"].sharding, 2)
    assert averaged_weights(workdir, abstract.params, 0.1, step=10)[0] == 10


def test_a_width_in_between_is_that_of_a_run_that_tracked_it(abstract, tmp_path):
    """Profiles are of continuous time: they are those of many steps, not of a dozen."""
    run = {"num_steps": 100, "log_every": 100, "checkpoint_every": 100}
    kept = PowerLaw(sigma_rels=(0.1, 0.14, 0.2), every=100)
    _, direct, _ = toy.train(tmp_path / "direct", power_law=kept, **run).opt_state.averages
    toy.train(tmp_path / "run", power_law=PowerLaw(sigma_rels=(0.1, 0.2), every=10), **run)
    _, found = averaged_weights(tmp_path / "run", abstract.params, 0.14)
    _, near = averaged_weights(tmp_path / "run", abstract.params, 0.1)
    distance = lambda a, b: optax.tree.norm(jax.tree.map(lambda x, y: np.asarray(x) - y, a, b))  # noqa: E731
    assert 0 < distance(found, direct) < 0.2 * distance(near, direct)


def test_runs_resume_with_their_averages_and_train_as_without(trained, tmp_path):
    workdir, state = trained
    shutil.copytree(workdir, tmp_path / "again")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    resumed = toy.train(tmp_path / "again", power_law=OPTIONS, keep=3)
    assert_equal(resumed.opt_state.averages, state.opt_state.averages)
    plain = toy.train(tmp_path / "plain")
    assert_equal(plain.params, state.params, rtol=1e-6, atol=1e-7)
    assert_equal(plain.ema, state.ema, rtol=1e-6, atol=1e-7)


def test_what_there_is_not(trained, abstract, tmp_path):
    with pytest.raises(SnapshotError, match=r"averages holds no snapshots: train with run\.power_law"):
        averaged_weights(tmp_path, abstract.params, 0.1)
    with pytest.raises(SnapshotError, match=r"no snapshot of step 7; there are \[5, 10, 12\]"):
        averaged_weights(trained[0], abstract.params, 0.1, step=7)
    with pytest.raises(ValueError, match=r"sigma_rel=0\.5: widths"):
        averaged_weights(trained[0], abstract.params, 0.5)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("updates", 10**12, "updates: found 1000000000000"),
        ("updates", None, "updates: found None"),
        ("averages", [{"file": "../a.safetensors", "sigma_rel": 0.1}], "expected a file of the same folder"),
        ("averages", [{"file": "a.safetensors", "sigma_rel": 0.5}], r"sigma_rel=0\.5: widths"),
        ("averages", [{"file": "a.safetensors"}], "sigma_rel"),
        ("averages", [], "list no averages"),
    ],
)
def test_a_damaged_list_of_averages_is_named(abstract, tmp_path, key, value, told):
    (tmp_path / "averages").mkdir()
    about = {"step": 5, "updates": 5, "averages": [{"file": "a.safetensors", "sigma_rel": 0.1}], key: value}
    (tmp_path / "averages" / "step_0000005.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=rf"averages.*{told}"):
        averaged_weights(tmp_path, abstract.params, 0.1)
