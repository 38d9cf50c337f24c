import json
import pathlib
import signal
import subprocess
import sys

import numpy as np

from tests.train import toy
from tests.train.test_interrupt import wait_for_step
from vidgen.parallel.mesh import MeshOptions

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_two_processes_of_four_devices_are_one_of_eight_and_stop_together(tmp_path):
    options = {"num_steps": 80, "checkpoint_every": 20, "log_every": 1}
    toy.train(tmp_path / "one", mesh=MeshOptions(**MESH).build(), **options)

    two = tmp_path / "two"
    run = [toy.__file__, str(two), json.dumps(MESH), json.dumps(options | {"delay": 0.2})]
    command = [*LOCAL, "--processes", "2", "--devices-per-process", "4", "--", *run]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(two, process, 12)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("resume with: toy again") == 1  # Process 0 alone speaks.
    stopped = toy.metrics(two)[-1]["step"]
    assert 12 <= stopped < 80 and (two / "checkpoints" / str(stopped)).is_dir()

    toy.train(two, mesh=MeshOptions(**MESH).build(), **options)
    assert [line["step"] for line in toy.metrics(two)] == list(range(1, 81))
    np.testing.assert_allclose(toy.losses(two), toy.losses(tmp_path / "one"), rtol=1e-5)


def test_a_process_that_fails_ends_the_others(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(3)\ntime.sleep(600)\n"
    )
    result = subprocess.run(
        [*LOCAL, "--", str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 3


def test_help_and_a_missing_command():
    result = subprocess.run([*LOCAL, "--help"], capture_output=True, text=True, check=True)
    assert "--devices-per-process" in result.stdout
    assert subprocess.run(LOCAL, capture_output=True, check=False).returncode == 2
