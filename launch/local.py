"""Runs a vidgen command or a Python script as several processes on this host, joined by jax.distributed.

    python launch/local.py --processes 2 --devices-per-process 4 -- train --config=... --workdir=...

It simulates a multi-host setup on one host; each process gets its own CPU devices. SIGTERM, SIGINT (Ctrl-C)
and SIGHUP are forwarded once to every process. If a process fails, the launcher prints which one and how,
ends the others, and returns its status (128 + n after signal n). The processes do not outlive the launcher:
if it is killed, they get SIGTERM, which saves a run.
"""

import argparse
import contextlib
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

_SUPERVISED = "--supervised-by"
_GRACE = 60.0
"""Seconds between SIGTERM and SIGKILL for a process whose launcher has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and waits for them; returns the first nonzero status, otherwise 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--devices-per-process", type=int, default=4, help="CPU devices of each process (default 4)"
    )
    parser.add_argument(
        "command",
        nargs="+",
        metavar="COMMAND",
        help='after "--": a vidgen command, or a script, and its options',
    )
    arguments = parser.parse_args(argv)
    address = f"localhost:{_free_port()}"
    # The processes read from a pipe whose write end only the launcher holds; it closes with the launcher.
    watched, _write_end = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    for index in range(arguments.processes):
        process = subprocess.Popen(
            [sys.executable, __file__, _SUPERVISED, str(watched), *arguments.command],
            env=_environment(address, arguments.processes, index, arguments.devices_per_process),
            pass_fds=(watched,),
            # In the launcher's session each process would get a terminal's SIGINT twice.
            start_new_session=True,
        )
        processes.append(process)
    os.close(watched)
    return _wait(processes)


def supervised(watched: int, command: Sequence[str]) -> None:
    """Runs a command in this process, and ends the process when the launcher ends."""
    threading.Thread(target=_end_with_launcher, args=(watched,), daemon=True).start()
    program, *options = command
    sys.argv = [program, *options]
    if program.endswith(".py"):
        sys.path[0] = str(pathlib.Path(program).absolute().parent)
        runpy.run_path(program, run_name="__main__")
    else:
        sys.argv = ["vidgen", *command]
        sys.path[0] = os.getcwd()
        runpy.run_module("vidgen.cli.main", run_name="__main__", alter_sys=True)


def _end_with_launcher(watched: int) -> None:
    os.read(watched, 1)  # Nothing is ever written: it returns when the write end is closed.
    with contextlib.suppress(OSError):  # stderr may be closed too.
        print("local.py: the launcher has ended; this process stops", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _environment(address: str, count: int, index: int, devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended or one has failed; then ends the others, which would wait for it forever."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [index for index, status in enumerate(statuses) if status]
        if failed:
            status = statuses[failed[0]] or 0
            how = (
                f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed (status {status})"
            )
            what = f"process {failed[0]} of {len(processes)} (pid {processes[failed[0]].pid}) {how}"
            print(f"local.py: {what}; ending the others", file=sys.stderr, flush=True)
            _end(processes)
            return 128 - status if status < 0 else status
        if None not in statuses:
            return 0
        time.sleep(0.1)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 20
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == [_SUPERVISED]:
        supervised(int(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
