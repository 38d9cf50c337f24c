import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vidgen.train.workdir_lock import WorkdirLock, WorkdirLockedError

HOLD = """
import pathlib, sys, time
from vidgen.train.workdir_lock import WorkdirLock
with WorkdirLock(workdir=pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def record(workdir, **values):
    text = {"host": "another", "pid": 1, "started": "5", "since": "yesterday", "token": "t", "count": 3}
    handle = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
    os.pwrite(handle, json.dumps(text | values).ljust(400).encode(), 0)  # At once, as the lock does.
    os.close(handle)


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_until_the_first_is_done(tmp_path):
    workdir = tmp_path / "run"
    with (
        WorkdirLock(workdir=workdir),
        pytest.raises(WorkdirLockedError, match=rf"run is in use by .*process {os.getpid()} on .*kill"),
    ):
        WorkdirLock(workdir=workdir).__enter__()
    assert list(workdir.iterdir()) == []
    with WorkdirLock(workdir=workdir):
        pass


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirLockedError, match=r"file/.lock cannot be written .*: use another workdir"):
        WorkdirLock(workdir=tmp_path / "file").__enter__()


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(WorkdirLockedError, match=f"process {holder.pid} "):
        WorkdirLock(workdir=tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with WorkdirLock(workdir=tmp_path):
        pass


@pytest.fixture
def without_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_the_record_decides(tmp_path):
    with WorkdirLock(workdir=tmp_path):
        mine = json.loads((tmp_path / ".lock").read_text())
        with pytest.raises(WorkdirLockedError, match="in use"):
            WorkdirLock(workdir=tmp_path).__enter__()
    record(tmp_path, **mine | {"pid": dead_pid()})
    with WorkdirLock(workdir=tmp_path):
        pass
    # The number of a dead process, given to a new one.
    record(tmp_path, **mine | {"started": "0"})
    with WorkdirLock(workdir=tmp_path):
        pass


def test_a_lock_of_another_host_is_taken_over_when_its_count_stands_still(tmp_path, caplog):
    record(tmp_path)
    begin = time.monotonic()
    with WorkdirLock(workdir=tmp_path, patience=0.3):
        assert time.monotonic() - begin >= 0.3
    assert "process 1 on another had this workdir" in caplog.text


def test_a_lock_of_another_host_that_is_alive_is_refused(tmp_path):
    record(tmp_path)
    done = threading.Event()

    def live():
        count = 4
        while not done.wait(0.05):
            record(tmp_path, count=count)
            count += 1

    holder = threading.Thread(target=live)
    holder.start()
    try:
        with pytest.raises(WorkdirLockedError, match="process 1 on another, since yesterday"):
            WorkdirLock(workdir=tmp_path, patience=60.0).__enter__()
    finally:
        done.set()
        holder.join()


def test_the_holder_counts_up_and_half_a_record_is_nobodys(tmp_path):
    (tmp_path / ".lock").write_text('{"host": "an')
    with WorkdirLock(workdir=tmp_path, beat=0.01, patience=0.1):
        for _ in range(500):
            if json.loads((tmp_path / ".lock").read_text())["count"] > 1:
                return
            time.sleep(0.01)
    raise AssertionError("the count does not go up")
