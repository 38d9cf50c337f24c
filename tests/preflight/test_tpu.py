"""The 1.3B experiment compiled for real TPU slices, by libtpu, on the CPU: minutes each, so marked slow."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MINUTE = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(90 * MINUTE),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='libtpu is not installed: pip install "vidgen[tpu]"',
    ),
]


def preflight(*options):
    """Exit status, report and all of standard output; in a process of its own, for libtpu loads once."""
    command = [sys.executable, "-m", "vidgen.cli.main", "preflight", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=80 * MINUTE, check=False
    )
    assert result.stdout, result.stderr[-3000:]
    return result.returncode, json.loads(result.stdout.splitlines()[-1]), result.stdout


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
def test_1b_fits_and_its_state_is_sharded_as_asked(topology, capsys):
    status, report, output = preflight(
        "--config=experiments/dit/t2v_1b.py", "--vae=experiments/vae/wan.py", f"--topology={topology}"
    )
    with capsys.disabled():
        print("\n" + "\n".join(output.splitlines()[:-1]))
    memory, layout = report["memory"], report["layout"]
    assert status == 0 and report["fits"]
    assert memory["peak"] <= memory["available"]
    assert report["num_parameters"] > 1.3e9
    # Parameters, averages, and Adam's two moments of each.
    assert layout["moved"] == {} and layout["as_asked"] == layout["num_arrays"] >= 4 * 50
    assert layout["sharded_bytes"] > 0.999 * layout["total_bytes"]
    assert layout["per_chip_bytes"] < 1.01 * layout["total_bytes"] / 16
    assert memory["arguments"] < layout["per_chip_bytes"] + 2**29


def test_a_step_that_is_too_large_is_refused_with_what_to_change():
    status, report, output = preflight(
        "--config=experiments/dit/t2v_1b.py:tiny",
        "--vae=experiments/vae/wan.py:tiny",
        "--topology=v5e:2x2",
        "--config.data.num_frames=1",
        "--config.data.height=2048",
        "--config.data.width=2048",
    )
    assert status == 1 and not report["fits"]
    assert report["memory"]["peak"] > report["memory"]["available"]
    assert "DOES NOT FIT" in output and any("num_frames" in advice for advice in report["advice"])
