import json
import os
import signal
import subprocess
import sys
import time

from tests.train import toy
from tests.train.test_loop import same_bits
from vidgen.train.interrupt import StopSignal

OPTIONS = {"num_steps": 60, "checkpoint_every": 4, "log_every": 1}


def start(workdir, **options):
    arguments = [str(workdir), json.dumps({"data": 1}), json.dumps(OPTIONS | options)]
    command = [sys.executable, toy.__file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(workdir, process, step):
    """Until the run has logged `step`."""
    path = workdir / "metrics.jsonl"
    for _ in range(2400):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and lines[-1].endswith("\n") and json.loads(lines[-1])["step"] >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()[1]}")
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_killed_then_terminated_then_finished_is_the_run_without_a_break(tmp_path):
    whole = toy.train(tmp_path / "whole", **OPTIONS)
    workdir = tmp_path / "broken"

    process = start(workdir, delay=0.2)
    wait_for_step(workdir, process, 9)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()

    process = start(workdir, delay=0.2)
    wait_for_step(workdir, process, 15)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "of 60; resume with: toy again" in out
    assert "resuming after step" in err
    stopped = toy.metrics(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    finished = toy.train(workdir, **OPTIONS)
    assert toy.losses(workdir) == toy.losses(tmp_path / "whole")
    same_bits(finished, whole)
    assert [line["step"] for line in toy.metrics(workdir)] == list(range(1, 61))


def test_signals_become_a_flag_within_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_is_not_waited_for():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received
        try:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second SIGINT was swallowed")
        except KeyboardInterrupt:
            pass
