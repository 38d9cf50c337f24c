"""Lock of a workdir, held by the one run that trains there."""

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
    """The workdir is not available to this run; the message says why, who holds it, and what to do."""


@dataclasses.dataclass(kw_only=True)
class WorkdirLock:
    """Context manager that excludes other runs from `workdir`.

    Process 0 holds the lock for all processes of a run, which enter and leave together. The holder writes its
    host, its PID and a count that increases every `beat` seconds to `workdir`/.lock, and locks that file with
    flock. The lock of a dead process is taken over: at once if it was on this host; if it was on another,
    after its count has not changed for `patience` seconds, because on shared file systems flock may not reach
    other hosts, or may not exist.

    Attributes:
      beat: seconds between writes.
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
          WorkdirLockedError: another run holds it, or `workdir` is not writable; on every process.
        """
        problem = ""
        if processes.is_main_process():
            try:
                self._take()
            except WorkdirLockedError as error:
                problem = str(error)
            except OSError as error:  # The other processes wait for the broadcast.
                problem = (
                    f"{self._path} cannot be written ({error}): use another workdir, or fix its permissions"
                )
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
                time.sleep(min(1.0, self.patience / 10))  # Its creator may be about to write a record.
            self._await_dead_holder(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self._write(0)
        self._beating = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
        self._beating.start()

    def _open(self) -> int:
        """Handle of the lock file, with flock if the file system supports it.

        Raises:
          WorkdirLockedError: another process holds the flock.
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
            # A holder removes the file before it unlocks it: then this handle is of a deleted file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self._path)):
                    return handle
            os.close(handle)

    def _await_dead_holder(self, handle: int) -> None:
        """Returns once the writer of the record is known to be dead.

        Raises:
          WorkdirLockedError: it is alive.
        """
        record = self._record()
        if record is None:
            return
        pid = int(record.get("pid", 0))
        if record.get("host") == socket.gethostname():
            # If flock works, this process has it and the old holder is gone; without flock it may be alive.
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
            "%s: %s had this workdir and did not release it; waiting %.0f s to see whether it is alive",
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
        """Record of the holder; None if it is missing or incomplete."""
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
        # In place, since the flock is on this file; padded, since an old record may be longer.
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
                _log.error(
                    "%s: another run has taken over the lock of this run: stop one of them", self.workdir
                )
                return
            with contextlib.suppress(OSError):  # E.g. a full disk, which other writes report.
                self._write(count)


def _has_flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _started(pid: int) -> str | None:
    """Start time of a process on this host; None if there is no such process, "" if it is unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        # The 22nd field; the second, a name in parentheses, may contain anything.
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
