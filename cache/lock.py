"""Who works on a folder: one process at a time; when it dies, the folder is free.

::

    caltech-1a2b3c4d.lock            locked by the kernel (`flock`), which frees it when its holder dies
    caltech-1a2b3c4d.lock.held       where the file system has no locks: whoever can create this file has the folder …
    caltech-1a2b3c4d.lock.takeover   … and whoever can create this one may remove the file of a holder that is gone

Such a file says who created it. A holder on this machine is gone when its process is; one elsewhere when it has not
touched its file for ten minutes, by the clock of the file system, which holders do every half minute. An object store
(`cache.remote`) has no locks either: there they are objects, created by conditional puts and dated by the store.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cache.errors import CacheBusyError, CacheError
from cache.files import TEMPORARY, disk_errors, touch
from cache.remote import Place, RemotePath

# What a file system answers that has no locks: NFS without its lock service, FUSE, Lustre without flock.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_BEAT_S = 30.0  # a holder touches its file so often
_GONE_S = 600.0  # and is gone when it has not for so long: twenty touches that did not come
_TAKEOVER_S = 60.0  # taking over is a matter of milliseconds: whoever began it so long ago was killed
_PATIENCE_S = 2.0  # for a lock whose holder cannot be alive: a kernel may free it late, a new holder sign it late


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says.

    Attributes:
        host: name of the machine.
        process: its number there.
        since: UTC, ISO 8601.
        namespace: which numbering of processes that is: containers of one machine may count each for themselves.
        token: tells two locks of one process apart.
    """

    host: str
    process: int
    since: str
    namespace: str
    token: str

    @classmethod
    def here(cls) -> Self:
        """This process, from now on."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), since, _namespace(), secrets.token_hex(8))

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """What a lock's file says; None where that is nothing (yet)."""
        try:
            body = json.loads(text)
            holder = cls(**body)
            datetime.fromisoformat(holder.since)
        except (ValueError, TypeError):
            return None
        return holder if isinstance(holder.process, int) else None

    def to_bytes(self) -> bytes:
        """A line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"

    @property
    def is_dead(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen from here."""
        if (self.host, self.namespace) != (socket.gethostname(), _namespace()):
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's: it lives
            return False
        started = _started_at(self.process)  # a later process may have got its number
        return started is not None and started > datetime.fromisoformat(self.since).timestamp() + 2


class Lock:
    """An advisory lock on ``<path>.lock``, free when its holder dies.

    Args:
        path: what is locked; it need not exist, its folder must.
        doing: what the holder does with it, for the message to others.

    Attributes:
        notice: that the file system has no locks and what is done instead; said to the first lock of this process on
            that file system, None otherwise.

    Raises:
        CacheBusyError: somebody holds it; names the process and its host.
        CacheError: the file cannot be written or locked.
    """

    def __init__(self, path: Place, doing: str = "being filled") -> None:
        self.path: Place = path.with_name(f"{path.name}.lock")
        self.notice: str | None = None
        self._busy = f"{path} is {doing} by %s; wait for it, or stop it"
        self._held: _KernelLock | _FileLock
        held = path.with_name(f"{path.name}.lock.held")
        if isinstance(path, RemotePath):
            self._held = _FileLock(held, self._busy)
            return
        own = path.with_name(f"{path.name}.lock")
        try:
            self._held = _KernelLock(own, self._busy)
        except _NoLocksError as error:
            with suppress(OSError):
                own.unlink()
            self._held = _FileLock(held, self._busy)
            self.notice = _notice(path.parent, str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Whether it is still ours: a process that was suspended for long may find that another has taken it over.

        Raises:
            CacheBusyError: it is not; names who has it.
        """
        if (other := self._held.taken_by()) is not None:
            raise CacheBusyError(self._busy % other)

    def release(self) -> None:
        """Give the lock back; a second time does nothing."""
        self._held.release()


def hold(descriptor: int) -> None:
    """Show others that an open file is written, until it is closed or this process ends; see `is_held`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def is_held(descriptor: int) -> bool:
    """Whether a process holds the file by `hold`; without locks, whether it was written in the last ten minutes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return time.time() - os.fstat(descriptor).st_mtime < _GONE_S
    return False


class _NoLocksError(OSError):
    """The file system has no locks."""


class _KernelLock:
    """A lock of the kernel on an open file."""

    def __init__(self, path: Path, busy: str) -> None:
        self.path = path
        self._descriptor: int | None = None
        patient_until = time.monotonic() + _PATIENCE_S
        while self._descriptor is None:
            with disk_errors(path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._descriptor = self._try(descriptor, busy, time.monotonic() < patient_until)
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        with suppress(OSError):  # a full disk: the lock is held all the same, only nobody can read by whom
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, Holder.here().to_bytes(), 0)

    def _try(self, descriptor: int, busy: str, patient: bool) -> int | None:
        """The descriptor once it is locked; None where it is worth another try."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                return descriptor
            return None  # its last holder removed the file between our open and our lock: take the new one
        except BlockingIOError:
            holder = Holder.parse(os.pread(descriptor, 1000, 0))
            if holder is not None and not holder.is_dead:
                raise CacheBusyError(busy % holder) from None
            if not patient:
                raise CacheBusyError(self._nobody(holder)) from None
            time.sleep(0.05)
            return None
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise _NoLocksError(error.strerror) from None
            raise CacheError(f"{self.path}: cannot be locked: {error.strerror}") from error

    def _nobody(self, holder: Holder | None) -> str:
        whose = f"{holder}, which has ended" if holder else "a process that has not signed it"
        return (
            f"{self.path}: is locked by {whose}: a process that it started may still run, or the file system keeps the "
            "lock of a dead one; stop that process, or delete the file"
        )

    def taken_by(self) -> Holder | None:
        """Nobody can take it."""
        return None

    def release(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                self.path.unlink()  # while it is held: whoever waits at the old file sees that it is gone
            os.close(self._descriptor)
            self._descriptor = None


@dataclass
class _FileLock:
    """A file that one process alone can create, where the file system has no locks."""

    path: Place
    busy: str
    _me: Holder = field(default_factory=Holder.here)
    _done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        while not _create(self.path, self._me):
            holder = _read_holder(self.path)
            if not self._is_gone(holder):
                raise CacheBusyError(self.busy % (holder or "another process"))
            self._remove(holder)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _is_gone(self, holder: Holder | None) -> bool:
        dead = None if holder is None else holder.is_dead
        return _age_s(self.path) > _GONE_S if dead is None else dead

    def _remove(self, holder: Holder | None) -> None:
        """Remove the file of a holder that is gone, and no other: one process at a time looks again and removes."""
        takeover = self.path.with_suffix(".takeover")
        if not _create(takeover, self._me):
            if _age_s(takeover) > _TAKEOVER_S:
                takeover.unlink(missing_ok=True)
            time.sleep(0.01)
            return
        try:
            if _read_holder(self.path) == holder and self._is_gone(holder):
                self.path.unlink(missing_ok=True)
        finally:
            takeover.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(_BEAT_S):
            with suppress(OSError, CacheError):
                if self.taken_by() is not None:
                    return
                touch(self.path)

    def taken_by(self) -> Holder | None:
        """Who has it now, where that is somebody else."""
        holder = _read_holder(self.path)
        return None if holder is None or holder.token == self._me.token else holder

    def release(self) -> None:
        if not self._done.is_set():
            self._done.set()
            with suppress(OSError, CacheError):
                if self.taken_by() is None:
                    self.path.unlink()


def _create(path: Place, holder: Holder) -> bool:
    """Create a file unless there is one; of several who do one alone is told True."""
    if isinstance(path, RemotePath):
        return path.create(holder.to_bytes())
    with disk_errors(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with suppress(OSError):  # a full disk: it is held all the same
            os.write(descriptor, holder.to_bytes())
        os.close(descriptor)
    return True


def _read_holder(path: Place) -> Holder | None:
    try:
        return Holder.parse(path.read_bytes())
    except OSError:
        return None


def _age_s(path: Place) -> float:
    """Seconds since a file was touched, by the clock of its file system; 0 where it is gone."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with disk_errors(probe):
        try:
            if isinstance(probe, RemotePath):
                probe.write_bytes(b"")
            else:
                probe.touch(exist_ok=False)
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _started_at(process: int) -> float | None:
    """When a process of this machine began, in seconds since 1970; None where that is not known."""
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        return float(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None


_told: set[int] = set()  # file systems without locks that were spoken of


def _notice(folder: Path, reason: str) -> str | None:
    device = os.stat(folder).st_dev
    if device in _told:
        return None
    _told.add(device)
    return (
        f"{folder}: this file system has no locks ({reason}): a file *.lock.held stands for one; it is taken over when "
        f"its process has ended, or from another machine when it was not touched for {_GONE_S / 60:.0f} minutes"
    )
