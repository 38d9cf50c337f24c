import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.train import toy
from vidgen.core.tree import named_leaves
from vidgen.parallel import processes
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.optimizer import AdamW
from vidgen.train.state import FrozenState, init_state
from vidgen.train.step import StepOptions, make_train_step
from vidgen.train.step import clipped as clip
from vidgen.train.task import Total

ONE = MeshOptions(data=1)


def one_device():
    return MeshOptions().build(jax.devices()[:1])


def steps(mesh, count=1, *, task=None, seed=0, loader=None, **options):
    """State and metrics after some steps of the toy."""
    task = task or toy.ToyTask()
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=2)
    tx = optimizer.transformation(10)
    state, graphdef = init_state(task, tx, jax.random.key(seed), mesh)
    step = make_train_step(task, graphdef, {}, tx, StepOptions(**options), optimizer.schedule(10))
    seen = []
    with jax.set_mesh(mesh):
        for batch in (next(loader or toy.ToyLoader(8)) for _ in range(count)):
            state, metrics = step(state, FrozenState(), processes.global_batch(task.arrays(batch), mesh))
            seen.append(jax.device_get(metrics))
    return state, seen


def test_accumulation_is_the_full_batch():
    task = toy.ToyTask(noise=0.0)  # With noise, micro-batches draw their own.
    full, (metrics,) = steps(one_device(), task=task)
    parts, (others,) = steps(one_device(), task=task, grad_accumulation=4)
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-6)
    for name, leaf in named_leaves(full.params).items():
        np.testing.assert_allclose(named_leaves(parts.params)[name], leaf, rtol=1e-5, atol=1e-7)
    assert float(full.buffers["seen"][...]) == 1 and float(parts.buffers["seen"][...]) == 4


def test_accumulation_must_divide_the_batch():
    with pytest.raises(ValueError, match="grad_accumulation is 3, which does not divide the batch of 8"):
        steps(one_device(), grad_accumulation=3)


def test_the_state_keeps_its_shardings_and_is_donated():
    mesh = MeshOptions(data=2, fsdp=2, tensor=2).build()
    task = toy.ToyTask()
    tx = AdamW().transformation(10)
    state, graphdef = init_state(task, tx, jax.random.key(0), mesh)
    before = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(task, graphdef, {}, tx, StepOptions())
    with jax.set_mesh(mesh):
        batch = processes.global_batch(task.arrays(next(toy.ToyLoader(8))), mesh)
        new, _ = step(state, FrozenState(), batch)
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), new, before)
    assert all(jax.tree.leaves(kept))
    assert state.params["up"].get_value().is_deleted()


def test_average_decay_warms_up():
    start, _ = init_state(toy.ToyTask(), AdamW().transformation(10), jax.random.key(0), one_device())
    initial = np.asarray(start.params["up"][...])
    state, _ = steps(one_device(), ema_decay=0.999)
    expected = 0.1 * initial + 0.9 * np.asarray(state.params["up"][...])  # (1 + 0) / (10 + 0)
    np.testing.assert_allclose(state.ema["up"][...], expected, rtol=1e-6)
    frozen, _ = steps(one_device(), ema_decay=0.0)
    np.testing.assert_array_equal(frozen.ema["up"][...], frozen.params["up"][...])


def test_clipping_bounds_the_gradient_and_reports_its_norm():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Steep(toy.ToyTask):
        def loss(self, context):
            loss, metrics = super().loss(context)
            return 1e4 * loss, metrics

    mesh = one_device()
    # The first moment after one step is (1 - b1) times the gradient that the optimizer saw.
    norm = lambda state: float(jnp.sqrt(sum(jnp.square(x).sum() for x in moments(state)))) / 0.1  # noqa: E731
    clipped, (metrics,) = steps(mesh, task=Steep(), grad_clip=0.5)
    assert metrics["grad_norm"] > 100
    assert norm(clipped) == pytest.approx(0.5, rel=1e-5)
    free, _ = steps(mesh, task=Steep(), grad_clip=None)
    assert norm(free) == pytest.approx(metrics["grad_norm"], rel=1e-5)


def test_parts_that_learn_apart_are_clipped_by_their_own_norms():
    grads = nnx.State(
        {
            "a": {"x": nnx.Param(jnp.asarray([3.0, 0.0])), "y": nnx.Param(jnp.asarray([4.0]))},
            "b": {"x": nnx.Param(jnp.asarray([0.5]))},
            "c": {"x": nnx.Param(jnp.asarray([12.0]))},
        }
    )
    clipped, norms = clip(grads, 1.0, ("b", "a"))
    assert norms.keys() == {"a", "b"}
    assert float(norms["a"]) == pytest.approx(5.0)
    found = {name: np.asarray(leaf) for name, leaf in named_leaves(clipped).items()}
    np.testing.assert_allclose(found["a.x"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found["a.y"], [0.8], rtol=1e-6)
    np.testing.assert_allclose(found["b.x"], [0.5], rtol=1e-6)
    np.testing.assert_allclose(found["c.x"], [1.0], rtol=1e-6)
    together, none = clip(grads, 1.0, ())
    assert none == {} and optax.tree.norm(together) == pytest.approx(1.0)


def moments(state):
    return [leaf for name, leaf in named_leaves(state.opt_state).items() if ".mu." in f".{name}."]


def test_noise_differs_by_step_and_metrics_have_the_learning_rate():
    same = toy.ToyLoader(8)
    same.__class__ = type(
        "Same", (toy.ToyLoader,), {"__next__": lambda self: toy.ToyLoader.__next__(toy.ToyLoader(8))}
    )
    _, (first, second) = steps(one_device(), 2, loader=same, task=toy.ToyTask(noise=1.0))
    assert first["loss"] == first["mse"] != second["loss"]
    assert first["learning_rate"] == pytest.approx(0.5e-2) and second["learning_rate"] == pytest.approx(1e-2)


def test_a_loss_that_is_not_finite_changes_nothing_but_the_step():
    task = toy.ToyTask(fragile=True)
    state, seen = steps(one_device(), 3, task=task, loader=toy.ToyLoader(8, bad_batch=2))
    assert np.isfinite(seen[1]["loss"]) and not np.isfinite(seen[2]["loss"])
    good, _ = steps(one_device(), 2, task=task, loader=toy.ToyLoader(8))
    assert int(state.step) == 3
    for part in ("params", "ema", "buffers", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(good, part))


def test_totals_add_up_over_micro_batches():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Counts(toy.ToyTask):
        def loss(self, context):
            loss, metrics = super().loss(context)
            return loss, metrics | {"clips": Total(jnp.asarray(len(context.batch["video"]), jnp.float32))}

    for parts in (1, 4):
        _, (metrics,) = steps(one_device(), task=Counts(), grad_accumulation=parts)
        assert float(metrics["clips"]) == 8
