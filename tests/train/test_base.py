"""LoRA runs, whose base is in no checkpoint: its source, its dtype, and runs of before."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.train import toy
from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.core.tree import named_leaves
from vidgen.data.sprites.source import SpritesData
from vidgen.models.dit.config import VARIANTS as DIT_VARIANTS
from vidgen.models.text.config import ByteEncoderConfig
from vidgen.models.video_vae.config import VARIANTS as VAE_VARIANTS
from vidgen.models.video_vae.model import VideoVAE
from vidgen.nn.lora import LoRAOptions
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.experiment import Experiment, claim_workdir
from vidgen.train.optimizer import AdamW
from vidgen.train.options import RunOptions
from vidgen.train.restore import load_run
from vidgen.train.state import abstract_base
from vidgen.train.text_to_video_task import TextToVideoTask
from vidgen.train.vae_folder import save_vae

MESH = MeshOptions(fsdp=2).build(jax.devices()[:2])
FULL = {"num_steps": 1, "batch_size": 8, "log_every": 1, "checkpoint_every": 1, "eval_every": 0}


class Clips(toy.ToyLoader):
    def __next__(self):
        video = np.random.default_rng(self.next).integers(0, 256, (8, 1, 16, 16, 3), dtype=np.uint8)
        return super().__next__() | {"video": video, "caption": ["a red circle"] * 8}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae = VAE_VARIANTS["tiny"]
    save_vae(VideoVAE(vae, rngs=nnx.Rngs(0)), folder)
    return TextToVideoTask(
        vae=str(folder),
        dit=dataclasses.replace(
            DIT_VARIANTS["tiny"], in_channels=vae.latent_channels, num_layers=1, text_dim=32
        ),
        text=ByteEncoderConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=32, max_bytes=16),
    )


def with_lora(task, dtype="bfloat16"):
    lora = LoRAOptions(rank=2, targets=r"blocks\.ffn\..*")
    return dataclasses.replace(task, dit=dataclasses.replace(task.dit, dtype=dtype), lora=lora)


def train(workdir, task, **options):
    experiment = Experiment(
        task=task,
        data=SpritesData(num_frames=1, height=16, width=16),
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=1),
        run=RunOptions(**{**FULL, **options}),
    )
    experiment = claim_workdir(experiment, workdir)
    run = {field.name: getattr(experiment.run, field.name) for field in dataclasses.fields(experiment.run)}
    return toy.train(
        workdir,
        task=task,
        mesh=MESH,
        loader=Clips(8),
        optimizer=experiment.optimizer,
        **run,
    )


def weights(workdir):
    return {name: np.asarray(x) for name, x in named_leaves(load_run(workdir, MESH)[2]).items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


@pytest.fixture(scope="module")
def source(plain, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "run"
    train(workdir, plain, num_steps=3)  # before that, gates of zero keep gradients from the blocks
    return workdir


@pytest.fixture(scope="module")
def run(plain, source, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    return workdir, train(workdir, with_lora(plain), num_steps=2, init_from=str(source))


def bytes_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_checkpoints_hold_the_lora_alone(run, source):
    workdir, state = run
    with CheckpointManager(workdir / "checkpoints") as checkpoints:
        names = [name for name in checkpoints.shapes() if name not in ("step", "key")]
    assert names and all(".low_rank." in name or name.endswith("count") for name in names)
    assert not jax.tree.leaves(state.buffers)
    assert {name.split(".")[-1] for name in named_leaves(state.params)} == {"down", "up"}
    whole, small = (bytes_of(path / "checkpoints" / n) for path, n in ((source, "3"), (workdir, "2")))
    assert small < 0.1 * whole
    assert not (workdir / "base" / "model.safetensors").exists()


def test_matrices_of_the_base_have_the_dtype_of_products(plain):
    for dtype, expected in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        base = named_leaves(abstract_base(with_lora(plain, dtype), MESH))
        assert base["dit.blocks.self_attention.query.kernel"].dtype == expected
        assert base["dit.blocks.self_attention.query.bias"].dtype == jnp.float32
        assert base["dit.condition_embedder.time_1.kernel"].dtype == jnp.float32
        assert base["dit.blocks.ffn.up.kernel"].sharding.spec == P(None, "fsdp", None)


def test_a_run_is_loaded_from_its_source_in_full_precision(run, source):
    found, expected = weights(run[0]), weights(source)
    lora = {name for name in found if ".low_rank." in name}
    assert len(lora) == 4 and any(np.any(found[name]) for name in lora if name.endswith("up"))
    same(expected, {name: value for name, value in found.items() if name not in lora})


def test_resuming_is_bit_exact(plain, run, source, tmp_path):
    options = {"init_from": str(source), "schedule_steps": 2}
    train(tmp_path, with_lora(plain), num_steps=1, **options)
    state = train(tmp_path, with_lora(plain), num_steps=2, **options)
    same(
        {name: np.asarray(x) for name, x in named_leaves(run[1].params).items()},
        {name: np.asarray(x) for name, x in named_leaves(state.params).items()},
    )
    assert toy.losses(tmp_path) == toy.losses(run[0])


def test_a_source_that_moved_is_named_with_the_option_that_gives_its_path(plain, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    work = tmp_path / "run"
    train(work, with_lora(plain), init_from=str(tmp_path / "source"))
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"source', which is missing.*--config\.run\.init_from=PATH"):
        load_run(work, MESH)
    with pytest.raises(CheckpointError, match=r"--config\.run\.init_from=PATH"):
        train(work, with_lora(plain), num_steps=2, init_from=str(tmp_path / "source"))
    train(work, with_lora(plain), num_steps=2, init_from=str(tmp_path / "moved"))
    assert load_run(work, MESH)[1] == 2


def test_other_weights_in_its_place_are_an_error(plain, source, tmp_path):
    train(tmp_path / "other", plain, num_steps=3, seed=5)
    train(tmp_path / "run", with_lora(plain), init_from=str(source))
    with pytest.raises(CheckpointError, match=r"other weights than those of run\.init_from"):
        train(tmp_path / "run", with_lora(plain), num_steps=2, init_from=str(tmp_path / "other"))


def test_the_source_is_read_at_the_step_that_the_run_began_with(plain, tmp_path):
    train(tmp_path / "source", plain)
    train(tmp_path / "run", with_lora(plain), init_from=str(tmp_path / "source"))
    before = weights(tmp_path / "run")
    train(tmp_path / "source", plain, num_steps=2, keep=2)
    same(before, weights(tmp_path / "run"))
    shutil.rmtree(tmp_path / "source" / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; there are \[2\].*init_from=PATH"):
        load_run(tmp_path / "run", MESH)


def test_a_base_without_a_source_is_in_the_workdir_once(plain, tmp_path):
    train(tmp_path, with_lora(plain, "float32"))
    assert (tmp_path / "base" / "model.safetensors").exists()
    before = weights(tmp_path)
    train(tmp_path, with_lora(plain, "float32"), num_steps=2)
    after = weights(tmp_path)
    same(*({n: v for n, v in x.items() if ".low_rank." not in n} for x in (before, after)))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing: restore it from a copy"):
        train(tmp_path, with_lora(plain, "float32"), num_steps=3)


def test_a_lora_on_a_lora_has_the_first_merged(plain, run, source, tmp_path):
    from vidgen.nn.lora import merge_low_rank

    train(tmp_path, with_lora(plain, "float32"), init_from=str(run[0]))
    model = load_run(run[0], MESH)[2]
    merge_low_rank(model.dit)
    found = weights(tmp_path)
    for name, value in named_leaves(model).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_runs_whose_checkpoints_hold_the_base_still_load(plain, run, source, tmp_path):
    """As the older version saved them: the base in float32 among the buffers."""
    old = tmp_path / "run"
    shutil.copytree(run[0], old)
    shutil.rmtree(old / "base")
    base = named_leaves(load_run(source, MESH)[2])
    tree = {}
    for name, value in base.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = nnx.Param(value)
    state = dataclasses.replace(run[1], buffers=nnx.State(tree))
    shutil.rmtree(old / "checkpoints")
    with CheckpointManager(old / "checkpoints") as checkpoints:
        loader = {"next": 2}
        checkpoints.save(
            2, state, {"data": {"loader": loader, "recent": {"sums": {}, "counted": 0}, "line": {}}}
        )
    values = json.loads((old / "config.json").read_text())
    values["run"]["init_from"] = "gone"
    (old / "config.json").write_text(json.dumps(values))

    same(weights(run[0]), weights(old))
    resumed = train(old, with_lora(plain), num_steps=3, schedule_steps=2, init_from="gone")
    expected = tmp_path / "expected"
    shutil.copytree(run[0], expected)
    straight = train(expected, with_lora(plain), num_steps=3, schedule_steps=2, init_from=str(source))
    same(*({n: np.asarray(x) for n, x in named_leaves(s.params).items()} for s in (straight, resumed)))
    assert bytes_of(old / "checkpoints" / "3") < 0.1 * bytes_of(source / "checkpoints" / "3")
    # The base is in the workdir now.
    found = weights(old)
    same(base, {n: v for n, v in found.items() if ".low_rank." not in n})
