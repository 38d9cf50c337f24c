"""Runs one vidgen command, or a Python script, as several processes on this host, joined by jax.distributed.

    python launch/local.py --processes 2 --devices-per-process 4 -- train --config=... --workdir=...

For trying a multi-host setup where there is one host: each process gets its share of CPU devices. SIGTERM and
SIGINT are passed on to all; when one process fails the others are ended, and its status is returned.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and waits; returns the first status that is not 0, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices-per-process", type=int, default=4, help="CPU devices of each process")
    parser.add_argument(
        "command",
        nargs="+",
        metavar="COMMAND",
        help='after "--": a vidgen command, or a script, and its options',
    )
    arguments = parser.parse_args(argv)
    address = f"localhost:{_free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, *_program(arguments.command)],
            env=_environment(address, arguments.processes, index, arguments.devices_per_process),
        )
        for index in range(arguments.processes)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return _wait(processes)


def _program(command: Sequence[str]) -> list[str]:
    return [*command] if command[0].endswith(".py") else ["-m", "vidgen.cli.main", *command]


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
    """Until all have ended, or one has failed: then the others would wait for it for ever."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [status for status in statuses if status]
        if failed:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
            return failed[0]
        if None not in statuses:
            return 0
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
