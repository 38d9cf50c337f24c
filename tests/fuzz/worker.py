"""Reads damaged files, one after the other, and says how each reading ended.

To see one input again, its error with the traceback, and the damaged file:

    python -m tests.fuzz.worker --root /tmp/fuzz --keep png:17:1
"""

import argparse
import contextlib
import fnmatch
import functools
import gc
import importlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator

from tests.fuzz.target import Target, damage

ADDRESS_BYTES = 6 << 30
"""Beyond the address space at the beginning: asked for, a larger array is a MemoryError."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.chmod": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "shutil.rmtree": 1,
    "tempfile.mkdtemp": 1,
    "tempfile.mkstemp": 1,
}
"""Audit events that change files, and how many of their first arguments are paths."""
_EVENTS = "tensorboardX.proto.event_pb2"
"""Events travel to the thread that writes them through a queue that pickles."""
_NEVER = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class", "socket.connect")


class TooSlow(BaseException):
    """Raised by the timer. No `Exception`, so that nothing that is read takes it."""


class Watch:
    """What the interpreter reports of files while a damaged one is read."""

    def __init__(self, allowed: tuple[pathlib.Path, ...], secrets: tuple[pathlib.Path, ...]):
        self.on = False
        self.seen: list[str] = []
        self._allowed = tuple(str(path) for path in allowed)
        self._secrets = {str(path) for path in secrets}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            if _real(path) in self._secrets:
                self.seen.append(f"read {path}, which is outside the folder")
            elif (isinstance(flags, int) and flags & _WRITES) or (mode and set(mode) & set("wax+")):
                self._changed(event, path)
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                self._changed(event, path)
        elif event in _NEVER and arguments[:1] != (_EVENTS,):
            self.seen.append(f"{event} {arguments}"[:200])

    def _changed(self, event: str, path: object) -> None:
        real = _real(path)
        if real is not None and not real.startswith(self._allowed):
            self.seen.append(f"{event} of {real}, outside the folder")


def _real(path: object) -> str | None:
    if not isinstance(path, str | bytes | os.PathLike):
        return None  # A descriptor, which was opened before.
    return os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))


class Worker:
    """Reads inputs in folders below `root`, which holds nothing else."""

    def __init__(self, module: str, root: pathlib.Path, *, seed: int, cpu_seconds: float, peak_bytes: int):
        self.targets: dict[str, Target] = importlib.import_module(module).TARGETS
        self.root, self.seed = root.resolve(), seed
        self.cpu_seconds, self.peak_bytes = cpu_seconds, peak_bytes
        self.temporary = self.root / "tmp"
        for folder in ("tmp", "cwd", "seeds"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(self.temporary)
        os.chdir(self.root / "cwd")
        secrets = (self.root / "secret.safetensors", pathlib.Path("/etc/passwd"))
        secrets[0].write_bytes(b"\2\0\0\0\0\0\0\0{}")
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.devnull)
        self.watch = Watch(
            (self.root, pathlib.Path(cache), pathlib.Path("/dev/"), pathlib.Path("/proc/")), secrets
        )
        self.baseline = 0

    @functools.cache  # noqa: B019
    def seeds(self, name: str) -> pathlib.Path:
        """The valid files of a target, which are read once, so that what is imported late is there."""
        folder = self.root / "seeds" / name
        with _temporary_folder_of_its_own(self.root / "making"):
            if not folder.exists():
                folder.mkdir(parents=True)
                self.targets[name].make(folder)
        copy = self.root / "valid"
        shutil.copytree(folder, copy)
        self.targets[name].read(copy)
        shutil.rmtree(copy)
        return folder

    def prepare(self, names: list[str]) -> None:
        """Makes what is needed, and sets the limits of memory from here."""
        for name in names:
            self.seeds(name)
        gc.collect()
        self.baseline = _rss()
        size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, resource.RLIM_INFINITY))

    def run(self, name: str, index: int, *, keep: bool = False) -> dict:
        """Damages, reads, and looks at what is left; see the keys of what is returned."""
        target = self.targets[name]
        case = self.root / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.seeds(name), case)
        rng = random.Random(f"{name}/{self.seed}/{index}")
        first = sorted(path for path in self.seeds(target.donor or name).rglob("*") if path.is_file())[0]
        file = damage(target, case, first.read_bytes(), rng)
        before, descriptors = _listing(case), _descriptors()
        _reset_peak()
        started, outcome, error = time.process_time(), "success", ""
        try:
            with self._limits():
                target.read(case)
        except BaseException as found:
            outcome, error = self._judge(found, target, case)
            if keep:
                traceback.print_exception(found)
            del found
        seconds = time.process_time() - started
        problems = self.watch.seen[:3]
        if _descriptors() > descriptors:
            gc.collect()
            if (more := _descriptors() - descriptors) > 0:
                problems.append(f"left {more} descriptors open")
        self.watch.seen.clear()
        after = _listing(case)
        changed = [
            path
            for path in sorted(before.keys() | after.keys())
            if before.get(path) != after.get(path)
            and not any(fnmatch.fnmatch(path, p) for p in target.writes)
        ]
        if changed:
            problems.append(f"left or changed {changed[:5]}")
        for folder in (self.temporary, self.root / "cwd"):
            if left := sorted(str(path.relative_to(self.root)) for path in folder.rglob("*")):
                problems.append(f"left {left[:5]}")
                shutil.rmtree(folder)
                folder.mkdir()
        if (grown := max(0, _peak() - self.baseline)) > self.peak_bytes:
            problems.append(f"took {grown >> 20} MiB")
        return {
            "target": name,
            "index": index,
            "file": str(file.relative_to(case)),
            "outcome": "failure" if problems else outcome,
            "error": "; ".join([*problems, error] if error else problems),
            "seconds": round(seconds, 3),
            "peak": grown,
        }

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
        def too_slow(*_: object) -> None:
            raise TooSlow

        previous = signal.signal(signal.SIGPROF, too_slow)
        signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds, 1)
        self.watch.on = True
        try:
            yield
        finally:
            self.watch.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)

    def _judge(self, error: BaseException, target: Target, case: pathlib.Path) -> tuple[str, str]:
        """The outcome, and what to say of it."""
        from vidgen.core.errors import UserError
        from vidgen.data.source import BrokenClip

        text = f"{type(error).__name__}: {error}"[:600]
        if isinstance(error, TooSlow):
            return "failure", f"took more than {self.cpu_seconds:g} s of processor time\n{_where(error)}"
        if not isinstance(error, UserError | OSError | BrokenClip):
            return "failure", f"{text}\n{_where(error)}"
        known = [str(case), *target.names]
        known += [path.name for path in (*case.rglob("*"), *self.seeds(_name_of(self, target)).rglob("*"))]
        if not any(name in str(error) for name in known):
            return "failure", f"names no file: {text}\n{_where(error)}"
        if len(str(error)) > 20_000:
            return "failure", f"a message of {len(str(error)):,} characters: {text}"
        return type(error).__name__, text


def _name_of(worker: Worker, target: Target) -> str:
    return next(name for name, other in worker.targets.items() if other is target)


def _where(error: BaseException) -> str:
    """The last places in the package, and the very last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}vidgen{os.sep}" in frame.filename][-3:]
    places = [f"    {frame.filename}:{frame.lineno} {frame.name}" for frame in (*own, *frames[-1:])]
    return "\n".join(dict.fromkeys(places))


def _listing(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file; folders too."""
    return {
        str(path.relative_to(folder)): (0, 0)
        if path.is_dir()
        else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _rss() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most memory that the process had since the last reset."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) << 10


@contextlib.contextmanager
def _temporary_folder_of_its_own(folder: pathlib.Path) -> Iterator[None]:
    """What is left by what makes the valid files is no fault."""
    folder.mkdir(exist_ok=True)
    previous, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = previous
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="TARGET:FIRST:COUNT", help="TARGET: or *")
    parser.add_argument("--without", action="append", default=[], metavar="TARGET", help="not that one of *")
    parser.add_argument("--root", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", default="tests.fuzz.targets", help="has TARGETS")
    parser.add_argument("--cpu-seconds", type=float, default=10, help="limit of one reading")
    parser.add_argument("--peak-bytes", type=int, default=1 << 30, help="limit of one reading")
    parser.add_argument("--keep", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    # What C libraries print goes to stderr.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    # TensorBoard's writer imports it where it is, for seconds; nothing that is read here needs it.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    worker = Worker(
        arguments.module,
        arguments.root,
        seed=arguments.seed,
        cpu_seconds=arguments.cpu_seconds,
        peak_bytes=arguments.peak_bytes,
    )
    parts = [
        (name, int(first), int(count)) for name, first, count in (i.split(":") for i in arguments.inputs)
    ]
    plan = [
        (name, first, count)
        for pattern, first, count in parts
        for name in (worker.targets if pattern == "*" else [pattern])
        if name not in arguments.without
    ]
    print(json.dumps({"plan": plan}), file=out)
    worker.prepare([name for name, _, _ in plan])
    for name, first, count in plan:
        for index in range(first, first + count):
            print(json.dumps({"started": [name, index]}), file=out)
            print(json.dumps(worker.run(name, index, keep=arguments.keep)), file=out)


if __name__ == "__main__":
    main()
