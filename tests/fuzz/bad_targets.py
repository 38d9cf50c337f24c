"""Readers with each of the faults that fuzzing is to find, and one without any."""

import ctypes
import os
import pathlib
import socket
import tempfile

import numpy as np

from tests.fuzz.mutate import damage_bytes
from tests.fuzz.target import Target
from vidgen.core.errors import UserError


def _make(folder: pathlib.Path) -> None:
    (folder / "a.txt").write_bytes(bytes(range(64)))


def _target(fault, **options) -> Target:
    def read(folder: pathlib.Path) -> None:
        if folder.name == "case":  # The valid file is read too, to see that it can be.
            fault(folder)

    return Target(make=_make, damaged={"a.txt": damage_bytes}, read=read, **options)


def _names_it(folder: pathlib.Path) -> None:
    raise UserError(f"{folder / 'a.txt'}: damaged")


def _names_nothing(folder: pathlib.Path) -> None:
    raise UserError("damaged")


def _raises(folder: pathlib.Path) -> None:
    raise KeyError("a.txt")


def _loops(folder: pathlib.Path) -> None:
    while True:
        pass


def _hangs(folder: pathlib.Path) -> None:
    """Where no signal of the interpreter comes through."""
    ctypes.PyDLL(None).pause()


def _crashes(folder: pathlib.Path) -> None:
    ctypes.string_at(0)


def _fills_memory(folder: pathlib.Path) -> None:
    np.ones(300 << 20, np.uint8)


def _asks_for_memory(folder: pathlib.Path) -> None:
    np.zeros(1 << 40)


def _leaves_a_file(folder: pathlib.Path) -> None:
    (folder / "b.txt").write_text("b")


def _leaves_a_temporary_file(folder: pathlib.Path) -> None:
    os.close(tempfile.mkstemp()[0])


def _removes(folder: pathlib.Path) -> None:
    (folder / "a.txt").unlink()


def _writes_outside(folder: pathlib.Path) -> None:
    path = folder.parents[2] / "outside.txt"
    path.write_text("x")
    path.unlink()


def _reads_outside(folder: pathlib.Path) -> None:
    (folder / ".." / "secret.safetensors").read_bytes()


def _connects(folder: pathlib.Path) -> None:
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


def _leaves_a_descriptor(folder: pathlib.Path) -> None:
    os.open(folder / "a.txt", os.O_RDONLY)


FAULTS = {
    "names_nothing": (_names_nothing, "names no file: UserError: damaged"),
    "raises": (_raises, "KeyError: 'a.txt'"),
    "loops": (_loops, "took more than"),
    "hangs": (_hangs, "no answer for"),
    "crashes": (_crashes, "the worker ended with status -11"),
    "fills_memory": (_fills_memory, "MiB"),
    "asks_for_memory": (_asks_for_memory, "MemoryError"),
    "leaves_a_file": (_leaves_a_file, "left or changed ['b.txt']"),
    "leaves_a_temporary_file": (_leaves_a_temporary_file, "left ['tmp/tmp"),
    "leaves_a_descriptor": (_leaves_a_descriptor, "left 1 descriptors open"),
    "removes": (_removes, "left or changed ['a.txt']"),
    "writes_outside": (_writes_outside, "outside.txt, outside the folder"),
    "reads_outside": (_reads_outside, "which is outside the folder"),
    "connects": (_connects, "socket.connect"),
}
"""Each fault, and what is said of it."""

TARGETS = {
    "good": _target(_names_it),
    "writes": _target(_leaves_a_file, writes=("b.txt",)),
    **{name: _target(fault) for name, (fault, _) in FAULTS.items()},
}
