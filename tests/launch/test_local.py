import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.launch import damaged_checkpoint
from tests.train import toy
from tests.train.test_interrupt import wait_for_step
from vidgen.parallel.mesh import MeshOptions

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_two_processes_of_four_devices_are_one_of_eight_and_stop_together(tmp_path):
    options = {"num_steps": 80, "checkpoint_every": 1000, "log_every": 1}
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
    assert "process 1 of 2 (pid " in result.stderr and "failed (status 3)" in result.stderr


def test_a_process_that_is_killed_is_named_with_the_status_of_shells(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    command = [*LOCAL, "--processes", "1", "--", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 137
    assert "process 0 of 1 (pid " in result.stderr and "was ended by SIGKILL" in result.stderr


LISTENS = """
import os, pathlib, signal, sys, time
notes = pathlib.Path(sys.argv[1]) / os.environ["JAX_PROCESS_ID"]
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
notes.write_text("ready")
while not received:
    time.sleep(0.02)
time.sleep(0.5)
notes.with_suffix(".tmp").write_text(" ".join(received))
notes.with_suffix(".tmp").rename(notes)
"""


def listening(tmp_path):
    """A launcher in a session of its own, as a terminal has one, whose two processes note their signals."""
    script = tmp_path / "listens.py"
    script.write_text(LISTENS)
    launcher = subprocess.Popen(
        [*LOCAL, "--", str(script), str(tmp_path)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    assert notes(tmp_path, "") == ["ready", "ready"]
    return launcher


def notes(tmp_path, before):
    """What the processes note, once it is another text than `before`."""
    for _ in range(600):
        files = [tmp_path / "0", tmp_path / "1"]
        found = [file.read_text() if file.exists() else "" for file in files]
        if all(text not in ("", before) for text in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"still {found}")


def test_ctrl_c_at_a_terminal_reaches_each_process_once(tmp_path):
    launcher = listening(tmp_path)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.communicate(timeout=60)
    assert notes(tmp_path, "ready") == ["SIGINT", "SIGINT"] and launcher.returncode == 0


def test_processes_do_not_outlive_a_killed_launcher(tmp_path):
    launcher = listening(tmp_path)
    launcher.kill()
    launcher.communicate(timeout=60)
    assert notes(tmp_path, "ready") == ["SIGTERM", "SIGTERM"]


def test_help_and_a_missing_command():
    result = subprocess.run([*LOCAL, "--help"], capture_output=True, text=True, check=True)
    assert "--devices-per-process" in result.stdout
    assert subprocess.run(LOCAL, capture_output=True, check=False).returncode == 2


@pytest.mark.slow
def test_two_processes_agree_on_a_damaged_checkpoint_and_on_the_lock(tmp_path):
    command = [*LOCAL, "--devices-per-process", "2", "--", damaged_checkpoint.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    verdicts = [(tmp_path / f"verdict_{index}").read_text() for index in (0, 1)]
    assert verdicts == ["refused True step 1 left [1] same True none True"] * 2
