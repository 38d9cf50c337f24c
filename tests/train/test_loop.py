import json

import jax
import numpy as np
import pytest

from tests.train import toy
from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.metrics_buffer import NonFiniteLoss
from vidgen.train.optimizer import AdamW, Muon


def bits(state):
    """All numbers of a state, the key too."""
    arrays = {**vars(state), "key": jax.random.key_data(state.key)}
    return jax.tree.map(np.asarray, arrays)


def same_bits(a, b):
    a, b = bits(a), bits(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Recorder:
    """An evaluator that notes what it is given."""

    def __init__(self, every):
        self.every, self.name, self.seen = every, "recorder", []

    def __call__(self, model, frozen, *, step, workdir):
        self.seen.append((step, np.asarray(model.up[...])))
        return {"score": float(step)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 12 steps without a break: its workdir and last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, toy.train(workdir)


def test_a_run_learns_logs_and_saves(whole):
    workdir, state = whole
    lines = toy.metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert {"loss", "mse", "grad_norm", "learning_rate", "steps_per_second", "frames_per_second"} < set(
        lines[0]
    )
    assert int(state.step) == 12 and float(state.buffers["seen"][...]) == 12
    with CheckpointManager(workdir / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [8, 12]  # The newest two.
    assert list((workdir / "tensorboard").glob("events.*"))


def test_resuming_is_bit_exact_in_state_losses_and_data(whole, tmp_path):
    workdir, state = whole

    class Crash(Exception):
        pass

    class Crashing(Recorder):
        def __call__(self, model, frozen, *, step, workdir):
            raise Crash

    # Stops in step 6, two steps after the last checkpoint, and leaves half a line behind.
    with pytest.raises(Crash):
        toy.train(tmp_path, evaluators=[Crashing(6)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    loader = toy.ToyLoader(8)
    same_bits(toy.train(tmp_path, loader=loader), state)
    assert loader.next == 12
    assert toy.losses(tmp_path) == toy.losses(workdir)
    assert [line["step"] for line in toy.metrics(tmp_path)] == list(range(1, 13))


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(whole, capsys):
    workdir, state = whole
    before = (workdir / "metrics.jsonl").read_text()
    loader = toy.ToyLoader(8)
    same_bits(toy.train(workdir, loader=loader), state)
    assert loader.next == 12 and (workdir / "metrics.jsonl").read_text() == before
    assert "resume" not in capsys.readouterr().out


def test_losses_do_not_depend_on_the_mesh(whole, tmp_path):
    workdir, _ = whole
    for name, mesh in {"data": MeshOptions(), "all": MeshOptions(data=2, fsdp=2, tensor=2)}.items():
        toy.train(tmp_path / name, mesh=mesh.build())
        np.testing.assert_allclose(toy.losses(tmp_path / name), toy.losses(workdir), rtol=1e-5)


def test_a_run_goes_on_on_another_mesh(whole, tmp_path):
    workdir, _ = whole
    toy.train(tmp_path, mesh=MeshOptions(data=2, fsdp=4).build(), num_steps=12, checkpoint_every=4, keep=3)
    for step in ("8", "12"):
        _remove(tmp_path / "checkpoints" / step)
    state = toy.train(tmp_path, mesh=MeshOptions(data=2, fsdp=1, tensor=2).build(jax.devices()[:4]))
    assert dict(state.params["up"].get_value().sharding.mesh.shape)["tensor"] == 2
    np.testing.assert_allclose(toy.losses(tmp_path), toy.losses(workdir), rtol=1e-5)


def _remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_lines_are_means_and_evaluators_see_averaged_weights(whole, tmp_path):
    workdir, state = whole
    often, last = Recorder(6), Recorder(0)
    toy.train(tmp_path, evaluators=[often, last], log_every=5)
    assert [step for step, _ in often.seen] == [6, 12] and [step for step, _ in last.seen] == [12]
    np.testing.assert_array_equal(last.seen[0][1], np.asarray(state.ema["up"][...]))
    lines = {line["step"]: line for line in toy.metrics(tmp_path)}
    assert sorted(lines) == [5, 6, 10, 12]
    assert lines[5]["loss"] == pytest.approx(np.mean(toy.losses(workdir)[:5]), rel=1e-6)
    assert lines[12]["loss"] == pytest.approx(np.mean(toy.losses(workdir)[10:]), rel=1e-6)
    assert lines[6] == {"step": 6, "recorder/score": 6.0} and lines[12]["recorder/score"] == 12.0


def test_a_loss_that_is_not_finite_stops_names_the_clips_and_saves_nothing(tmp_path):
    run = {"task": toy.ToyTask(fragile=True), "loader": toy.ToyLoader(8, bad_batch=5), "log_every": 100}
    with pytest.raises(
        NonFiniteLoss, match=r"steps 6 to 6: .* clips are in .*nonfinite\.jsonl; .*=\[\[6,6\]\]"
    ):
        # Batch 5 is step 6; the checkpoint of step 8 finds it.
        toy.train(tmp_path, stop_after_nonfinite=1, **run)
    (report,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert report["step"] == 6 and report["clips"] == [f"clip-5-{row}" for row in range(8)]
    assert report["metrics"]["loss"] == "inf"
    with CheckpointManager(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4]
    state = toy.train(tmp_path, task=toy.ToyTask(fragile=True))  # The clip was mended.
    assert not (tmp_path / "nonfinite.jsonl").read_text()
    assert int(state.step) == 12 and np.isfinite(toy.losses(tmp_path)).all()


def test_a_run_starts_from_the_averaged_weights_of_another_with_another_optimizer(whole, tmp_path):
    workdir, source = whole
    mesh = MeshOptions(data=2, fsdp=4).build()
    run = {"init_from": str(workdir), "optimizer": Muon(), "mesh": mesh}
    state = toy.train(tmp_path / "zero", num_steps=1, ema_decay=0.0, **(run | {"optimizer": Still()}))
    jax.tree.map(np.testing.assert_array_equal, bits(state)["params"], bits(source)["ema"])
    jax.tree.map(np.testing.assert_array_equal, bits(state)["ema"], bits(source)["ema"])
    assert float(state.buffers["seen"][...]) == 13  # twelve of the run before
    # The run goes on from its own checkpoints.
    whole_run = toy.train(tmp_path / "whole", num_steps=4, checkpoint_every=2, **run)
    toy.train(tmp_path / "parts", num_steps=4, checkpoint_every=2, **run)
    _remove(tmp_path / "parts" / "checkpoints" / "4")
    same_bits(toy.train(tmp_path / "parts", num_steps=4, checkpoint_every=2, **run), whole_run)


def test_a_start_from_where_nothing_is_names_it(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere/checkpoints is missing: expected the workdir"):
        toy.train(tmp_path / "run", init_from=str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    toy.train(tmp_path, num_steps=1)
    with pytest.raises(CheckpointError, match="use the config that it was trained with"):
        toy.train(tmp_path, optimizer=Other())


class Still(AdamW):
    """Changes nothing."""

    def transformation(self, num_steps):
        import optax

        return optax.set_to_zero()


class Other(AdamW):
    def transformation(self, num_steps):
        import optax

        return optax.sgd(0.1)
