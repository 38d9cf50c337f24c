"""One run at a time in a workdir: the lock that the run which trains there holds."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from vidgen.core.errors import UserError
from vidgen.core.logging import get_logger
from vidgen.parallel import processes

__all__ = ["WorkdirLock", "WorkdirLockedError"]

_log = get_logger(__name__)
_NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class WorkdirLockedError(UserError):
    """A workdir that this run cannot have; the message says why, who has it, and what to do."""


@dataclasses.dataclass(kw_only=True)
class WorkdirLock:
    """A context manager: within the block no other run may hold the lock of `workdir`.

    Process 0 holds it for all processes of a run, which all enter and leave together. The holder writes its
    host, its process and a count that goes up every `beat` seconds to `workdir`/.lock, which it also locks
    with flock. A lock whose process is dead is taken over: at once where it was on this host; where it was on
    another, after its count has stood still for `patience` seconds, as on shared file systems flock may not
    reach from host to host, or may not exist.

    Attributes:
      beat: seconds.
      patience: seconds; several times `beat`.
    """

    workdir: pathlib.Path
    beat: float = 10.0
    patience: float = 60.0

    def __post_init__(self) -> None:
        self._path = pathlib.Path(self.workdir) / _NAME
        self._handle: int | None = None
        self._created = False
        self._end = threading.Event()
        self._beating: threading.Thread | None = None
        self._token = uuid.uuid4().hex

    def __enter__(self) -> "WorkdirLock":
        """Takes the lock.

        Raises:
          WorkdirLockedError: another run has it, or nothing can be written in `workdir`; on every process.
        """
        problem = ""
        if processes.is_main_process():
            try:
                self._take()
            except WorkdirLockedError as error:
                problem = str(error)
            except OSError as error:  # The other processes wait to hear of it.
                problem = f"{self._path} cannot be written ({error}): use another workdir, or mend its rights"
        problem = processes.broadcast_text(problem)
        if problem:
            raise WorkdirLockedError(problem)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is None:
            return
        self._end.set()
        if self._beating is not None:
            self._beating.join()
        if (self._record() or {}).get("token") == self._token:
            self._path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None

    def _take(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = self._open()
        try:
            if not self._created and self._record() is None:
                time.sleep(min(1.0, self.patience / 10))  # Another may be about to write its first record.
            self._await_the_dead(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self._write(0)
        self._beating = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
        self._beating.start()

    def _open(self) -> int:
        """The file, with flock where there is such a thing.

        Raises:
          WorkdirLockedError: another process has flock.
        """
        while True:
            try:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                self._created = True
            except FileExistsError:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                self._created = False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise self._refusal(self._record() or {}) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    raise
            # The holder removes the file before it lets go: then this is the lock of nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self._path)):
                    return handle
            os.close(handle)

    def _await_the_dead(self, handle: int) -> None:
        """Returns when whoever wrote the record is known to be dead.

        Raises:
          WorkdirLockedError: it is alive.
        """
        record = self._record()
        if record is None:
            return
        pid = int(record.get("pid", 0))
        if record.get("host") == socket.gethostname():
            # With flock this process has the file; without, the holder may live.
            if (
                _started(pid) is not None
                and _started(pid) == record.get("started")
                and not _has_flock(handle)
            ):
                raise self._refusal(record)
            _log.warning("%s: taking over the lock of process %d, which is dead", self.workdir, pid)
            return
        holder = f"process {pid} on {record.get('host')}"
        _log.warning(
            "%s: %s had this workdir and did not let go; waiting %.0f s to see whether it is alive",
            self.workdir,
            holder,
            self.patience,
        )
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self.patience / 10))
            if self._record() != record:
                raise self._refusal(self._record() or record)
        _log.warning("%s: taking over the lock of %s, which is dead", self.workdir, holder)

    def _refusal(self, record: dict[str, Any]) -> WorkdirLockedError:
        holder = f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"
        return WorkdirLockedError(
            f"{self.workdir} is in use by another run ({holder}): wait for it, stop it "
            f"(kill {record.get('pid')}), or use another workdir"
        )

    def _record(self) -> dict[str, Any] | None:
        """What the holder wrote; None for nothing, or half of it."""
        try:
            value = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _write(self, count: int) -> None:
        assert self._handle is not None
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": self._since if count else self._begin(),
            "token": self._token,
            "count": count,
        }
        # In place, for flock is on this very file; padded, as an old record may be longer.
        os.pwrite(self._handle, json.dumps(record).ljust(400).encode(), 0)
        os.ftruncate(self._handle, 400)

    def _begin(self) -> str:
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return self._since

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(self.beat):
            count += 1
            if (self._record() or {}).get("token") not in (None, self._token):
                _log.error("%s: another run has taken the lock of this one: stop one of them", self.workdir)
                return
            with contextlib.suppress(OSError):  # A full disk, say, is told by what it hurts.
                self._write(count)


def _has_flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _started(pid: int) -> str | None:
    """When a process of this host began; None where there is no such process, "" where it is not known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        # The 22nd field; the second, a name in parentheses, may hold anything.
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
