"""What a run leaves in its workdir, and features of prompts that are kept."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz.mutate import damage_bytes, damage_json, damage_lines, damage_safetensors
from tests.fuzz.target import Target
from vidgen.ckpt.manager import CheckpointError, CheckpointManager
from vidgen.core.config import resolve
from vidgen.experiments.vae import sprites
from vidgen.models.t5.prompts import FeatureCache
from vidgen.parallel.mesh import MeshOptions
from vidgen.train.experiment import Experiment, claim_workdir, load_experiment
from vidgen.train.metrics import MetricsWriter
from vidgen.train.power_law import Averaged, PowerLaw
from vidgen.train.restore import load_run
from vidgen.train.snapshots import averaged_weights, save_snapshots

STATE = {"params": {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros((3,), np.float32)}}
PARTS = {"data": {"next_index": 40, "seed": 1}}

experiment = functools.cache(lambda: resolve(Experiment, sprites.get_config("tiny")))


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _read_workdir(folder: pathlib.Path) -> None:
    """As training that resumes does, and as commands do that need the model, of which there is none."""
    load_experiment(folder)
    claim_workdir(experiment(), folder, write=False)


def _read_model(folder: pathlib.Path) -> None:
    """Up to the checkpoint, which is named as missing where the model could be built."""
    try:
        load_run(folder, MeshOptions().build())
    except CheckpointError as error:
        if "checkpoints is missing" not in str(error):
            raise


def _make_metrics(folder: pathlib.Path) -> None:
    with MetricsWriter(folder) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0 / step, "psnr": float(step)})
    for path in (folder / "tensorboard").iterdir():
        path.unlink()


def _read_metrics(folder: pathlib.Path) -> None:
    with MetricsWriter(folder, resume_step=3) as writer:
        writer.write(4, {"loss": 0.1})


def _make_checkpoints(folder: pathlib.Path) -> None:
    with CheckpointManager(folder / "checkpoints") as manager:
        for step in (1, 2):
            manager.save(step, jax.tree.map(jnp.asarray, STATE), PARTS)


def _read_checkpoint(folder: pathlib.Path) -> None:
    with CheckpointManager(folder / "checkpoints") as manager:
        step, _, parts = manager.restore(_abstract(STATE), parts=("data",))
        assert step in (1, 2) and set(parts) == {"data"}
        manager.shapes()


def _make_snapshots(folder: pathlib.Path) -> None:
    params = jax.tree.map(jnp.asarray, STATE["params"])
    for step in (10, 20):
        averaged = Averaged(count=jnp.int32(step), averages=(params, params), inner=())
        save_snapshots(folder, step, averaged, PowerLaw(sigma_rels=(0.05, 0.1)))


def _make_features(folder: pathlib.Path) -> None:
    FeatureCache(folder, "e" * 16).put("f" * 64, np.ones((3, 4), np.float32))


def _read_features(folder: pathlib.Path) -> None:
    FeatureCache(folder, "e" * 16).get("f" * 64)


TARGETS = {
    "workdir": Target(
        make=lambda folder: claim_workdir(experiment(), folder),
        damaged={"config.json": damage_json},
        read=_read_workdir,
    ),
    "workdir_model": Target(
        make=lambda folder: claim_workdir(experiment(), folder),
        damaged={"config.json": damage_json},
        read=_read_model,
    ),
    "metrics": Target(
        make=_make_metrics,
        damaged={"metrics.jsonl": damage_lines},
        read=_read_metrics,
        writes=("metrics.jsonl", "tensorboard/*"),
    ),
    "checkpoints": Target(
        make=_make_checkpoints,
        damaged={
            "checkpoints/2/**/*METADATA*": damage_json,
            "checkpoints/2/**/data/*": damage_json,
            "checkpoints/2/**/*": damage_bytes,
        },
        read=_read_checkpoint,
    ),
    "snapshots": Target(
        make=_make_snapshots,
        damaged={"averages/*.json": damage_json, "averages/*.safetensors": damage_safetensors},
        read=lambda folder: averaged_weights(folder, _abstract(STATE["params"]), 0.07),
    ),
    "features": Target(
        make=_make_features, damaged={"**/*.safetensors": damage_safetensors}, read=_read_features
    ),
}
