"""How runs end, in the middle or at their last step, and go on as if they had not."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.train import toy
from tests.train.test_loop import same_bits
from vidgen.ckpt.manager import CheckpointManager
from vidgen.train.interrupt import Stopped

RATES = {"steps_per_second", "frames_per_second"}
OPTIONS = {"log_every": 5, "checkpoint_every": 6}


class Recorder:
    """An evaluator that notes when it was called; `action` comes in the middle of its work at a step."""

    def __init__(self, every, name="recorder", action=None, at=None):
        self.every, self.name, self.action, self.at, self.seen = every, name, action, at, []

    def __call__(self, model, frozen, *, step, workdir):
        if step == self.at and self.action:
            self.action()
        self.seen.append(step)
        return {"score": float(np.asarray(model.up[...]).sum())}


class Stopping(toy.ToyLoader):
    """SIGTERM arrives while the batch of step `at` is made."""

    def __init__(self, at):
        super().__init__(8)
        self.at = at

    def __next__(self):
        batch = super().__next__()
        if self.next == self.at:
            terminate()
        return batch


class Crash(Exception):
    pass


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise Crash


def lines(workdir):
    return [{k: v for k, v in line.items() if k not in RATES} for line in toy.metrics(workdir)]


def saved(workdir):
    with CheckpointManager(workdir / "checkpoints") as checkpoints:
        return checkpoints.steps()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a break: its workdir and last state."""
    workdir = tmp_path_factory.mktemp("whole")
    evaluators = [Recorder(4), Recorder(0, "final")]
    state = toy.train(workdir, evaluators=evaluators, **OPTIONS)
    assert [e.seen for e in evaluators] == [[4, 8, 12], [12]]
    return workdir, state


def check_as_whole(workdir, state, whole):
    same_bits(state, whole[1])
    assert lines(workdir) == lines(whole[0])
    assert (workdir / "finished.txt").read_text() == (whole[0] / "finished.txt").read_text()


# The last step; one with an evaluation, without a checkpoint; one without a line.
@pytest.mark.parametrize("at", [12, 8, 7])
def test_a_run_that_is_stopped_anywhere_makes_and_says_what_it_would_have(at, whole, tmp_path, capsys):
    evaluators = [Recorder(4), Recorder(0, "final")]
    toy.train(tmp_path, loader=Stopping(at), evaluators=evaluators, **OPTIONS)
    assert f"stopped after step {at} of 12; resume with: toy again" in capsys.readouterr().out
    assert saved(tmp_path)[-1] == at and not (tmp_path / "finished.txt").exists()
    assert evaluators[0].seen == [step for step in (4, 8) if step < at] and not evaluators[1].seen
    state = toy.train(tmp_path, evaluators=evaluators, **OPTIONS)
    assert [e.seen for e in evaluators] == [[4, 8, 12], [12]]
    check_as_whole(tmp_path, state, whole)


@pytest.mark.parametrize("action", [crash, terminate])
def test_an_evaluation_that_is_cut_short_loses_no_step_and_is_made_up_for(action, whole, tmp_path):
    cut = Recorder(4, action=action, at=8)
    if action is crash:
        with pytest.raises(Crash):
            toy.train(tmp_path, evaluators=[cut, Recorder(0, "final")], **OPTIONS)
    else:
        toy.train(tmp_path, evaluators=[cut, Recorder(0, "final")], **OPTIONS)
    assert cut.seen == [4] and saved(tmp_path)[-1] == 8  # before the evaluation, and no step after it
    evaluators = [Recorder(4), Recorder(0, "final")]
    loader = toy.ToyLoader(8)
    state = toy.train(tmp_path, loader=loader, evaluators=evaluators, **OPTIONS)
    assert [e.seen for e in evaluators] == [[8, 12], [12]] and loader.next == 12
    check_as_whole(tmp_path, state, whole)


def test_signals_while_the_last_checkpoint_is_written_do_not_lose_it(tmp_path, monkeypatch):
    close = CheckpointManager.close

    def closed_under_fire(self):
        terminate()
        terminate()
        close(self)

    monkeypatch.setattr(CheckpointManager, "close", closed_under_fire)
    toy.train(tmp_path, num_steps=2)
    monkeypatch.undo()
    assert saved(tmp_path) == [2]


def test_a_signal_before_the_first_step_ends_the_run_with_a_line(tmp_path):
    class Slow(toy.ToyTask):
        def frozen(self):
            terminate()
            raise AssertionError("the start went on")

    with pytest.raises(
        Stopped, match="before the first step, nothing is lost; start again with: toy again"
    ) as e:
        toy.train(tmp_path, task=Slow())
    assert e.value.number == signal.SIGTERM and not saved(tmp_path)


def test_a_signal_does_not_wait_for_a_compiler():
    # A call that, like that of a compiler, does not come back to Python for long.
    program = """if True:
        import hashlib, os, signal, threading
        from vidgen.train.interrupt import StopSignal
        with StopSignal("stopped; start again with: X") as stop, stop.at_once(end_process=True):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.run([sys.executable, "-c", program], timeout=100, check=False, **pipes)
    assert (process.returncode, process.stderr) == (143, "vidgen: stopped; start again with: X\n")


def test_a_run_that_is_over_is_finished_once_more_and_evaluated_no_more(whole, tmp_path):
    evaluator = Recorder(2)
    toy.train(tmp_path, num_steps=2, evaluators=[evaluator])
    toy.train(tmp_path, num_steps=2, evaluators=[evaluator])
    assert evaluator.seen == [2] and len((tmp_path / "finished.txt").read_text().splitlines()) == 2
