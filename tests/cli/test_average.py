import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidgen.cli.main import main
from vidgen.pipeline import load
from vidgen.train.power_law import Averaged, PowerLaw
from vidgen.train.snapshots import save_snapshots


def average(*arguments):
    return main(["average", *map(str, arguments)])


def test_a_folder_to_sample_from(tiny_runs, tmp_path, capsys):
    run, out = tmp_path / "dit", tmp_path / "out"
    shutil.copytree(tiny_runs.dit, run)
    arguments = ["--checkpoint", run, "--out", out, "--sigma-rel", 0.1]
    assert average(*arguments) == 2
    assert "averages holds no snapshots: train with run.power_law" in capsys.readouterr().err
    assert not out.exists()

    params = nnx.state(load(run).model, nnx.Param)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    state = Averaged((), jnp.asarray(40), (params, doubled))
    save_snapshots(run, 2, state, PowerLaw())
    assert average(*arguments) == 0
    assert capsys.readouterr().out.startswith(f"{out}: weights at step 2, averaged with sigma_rel 0.1")
    found = nnx.state(load(out).model, nnx.Param)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(doubled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert average(*arguments) == 2
    assert "is there already: name a folder that is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--sigma-rel": 0.3}, "sigma_rel=0.3: widths of averages are above 0 and below 0.2887"),
        ({"--checkpoint": "no/such/run"}, "no/such/run is not the workdir of a training run"),
        ({"--checkpoint": "vae"}, "a run of kind 'vae'"),
    ],
)
def test_errors(tiny_runs, tmp_path, capsys, changes, message):
    options = {"--checkpoint": tiny_runs.dit, "--out": tmp_path / "out", "--sigma-rel": 0.1} | changes
    if options["--checkpoint"] == "vae":
        options["--checkpoint"] = tiny_runs.vae
    assert average(*(x for pair in options.items() for x in pair)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
