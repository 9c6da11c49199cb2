"""System calls that fail: the calls which the engine, and send-file, make of a disk are counted,
and any of them can be made to fail, or to do less than it was asked.

The place is the boundary itself: the names under which `pynbd.block.engine`, its ``syscalls`` and
the server's ``stream`` call the system. What a call does that is not made to fail is the real one's
work. EINTR is in no table but that of fallocate: those calls that go through `os` never show it
(PEP 475), so that it has to be injected below Python (`interop/test_faults_process.py`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from pynbd.block import engine, syscalls
from pynbd.server import stream

SHORT = "short"  # it does half of what it is asked
NOTHING = "nothing"  # it does nothing of it, and says so: 0 bytes

_ROOM = ("ENOSPC", "EDQUOT", "EFBIG")
_READ = ("EIO", "ENOMEM", SHORT, NOTHING)
_WRITE = ("EIO", *_ROOM, "ENOMEM", SHORT, NOTHING)
# What can happen to each call (its section 2 page, "ERRORS"), as far as a host can be blamed.
FAULTS = {
    "open": ("EIO", "EMFILE", "ENFILE", "ENOMEM", "EACCES"),
    "fstat": ("EIO", "ENOMEM"),
    "fstatfs": ("EIO", "ENOSYS"),
    "close": ("EIO", "ENOSPC"),
    "F_OFD_SETLK": ("EAGAIN", "EACCES", "ENOLCK", "EIO", "ENOMEM"),
    "F_OFD_GETLK": ("ENOLCK", "EIO", "ENOMEM"),
    "preadv2": ("EIO", "EAGAIN", "EOPNOTSUPP", "ENOMEM", SHORT, NOTHING),
    "preadv": _READ,
    "pread": _READ,
    "pwrite": _WRITE,
    "pwritev": _WRITE,
    "fallocate": ("EIO", *_ROOM, "ENOMEM", "EOPNOTSUPP", "EINTR"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "ftruncate": ("EIO", "ENOSPC", "EFBIG"),
    "SEEK_END": ("EIO",),
    "SEEK_DATA": ("EIO", "EINVAL"),
    "SEEK_HOLE": ("EIO", "EINVAL"),
    "posix_fadvise": ("EIO", "ENOMEM"),
    "cachestat": ("ENOSYS", "EPERM", "ENOMEM"),
    "sendfile": ("EIO", "EINVAL", "ENOMEM", "EAGAIN", SHORT, NOTHING),
}
# Nobody sees that a call was interrupted, did less than it was asked, was not to be had, or could
# not be made without waiting; nor that one failed which has another way beside it.
_INVISIBLE = frozenset({SHORT, "EINTR", "EAGAIN", "EOPNOTSUPP"})
_NOT_NEEDED = frozenset({"preadv2", "cachestat", "fstatfs", "close"})
_WHENCE = {os.SEEK_END: "SEEK_END", os.SEEK_DATA: "SEEK_DATA", os.SEEK_HOLE: "SEEK_HOLE"}
_LOCKS = {fcntl.F_OFD_SETLK: "F_OFD_SETLK", fcntl.F_OFD_GETLK: "F_OFD_GETLK"}


class Fault(NamedTuple):
    """The call of that name and number (from 1) has that outcome: the name of an errno, `SHORT` or
    `NOTHING`. ``lasting``: so have those that come after it, until it is mended.
    """

    call: str
    number: int
    outcome: str
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.call}:{self.number}:{self.outcome}{':lasting' * self.lasting}"

    @property
    def invisible(self) -> bool:
        """Whether everything has to go on as if nothing had happened."""
        if self.call in _LOCKS.values():  # EAGAIN: somebody else's
            return False
        return self.call in _NOT_NEEDED or self.outcome in _INVISIBLE

    @classmethod
    def parse(cls, text: str) -> Fault:
        """What `str` has made of one."""
        call, number, outcome, *lasting = text.split(":")
        return cls(call, int(number), outcome, bool(lasting))


@dataclass
class Host:
    """Counts the calls, and has its `Fault`. Any thread may call."""

    fault: Fault | None = None

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.met = 0  # calls that had the fault
        self._lock = threading.Lock()

    def mend(self) -> None:
        """A lasting fault is over, if it has begun."""
        if self.met:
            self.fault = None

    def outcome(self, call: str) -> str:
        """What happens to this call; "" for nothing unusual."""
        with self._lock:
            self.counts[call] += 1
            fault = self.fault
            if fault is None or fault.call != call or self.counts[call] < fault.number:
                return ""
            if self.counts[call] > fault.number and not fault.lasting:
                return ""
            # A call that goes on for ever doing less ends nothing.
            if self.met and fault.outcome in (SHORT, "EINTR", "EAGAIN") and call != "preadv2":
                return ""
            self.met += 1
            return fault.outcome


def _failure(outcome: str) -> OSError:
    code = getattr(errno, outcome)
    return OSError(code, os.strerror(code))


def _half(length: int) -> int:
    """Half of it, in whole sectors where that is possible."""
    return length // 1024 * 512 if length >= 1024 else (length + 1) // 2 if length < 512 else length


class _Os:
    """The module `os`, with calls of this host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _fails(self, call: str) -> str:
        """SHORT, NOTHING or "", or it raises what happens."""
        outcome = self._host.outcome(call)
        if outcome not in ("", SHORT, NOTHING):
            raise _failure(outcome)
        return outcome

    def open(self, *args: Any) -> int:
        self._fails("open")
        return os.open(*args)

    def close(self, fd: int) -> None:
        os.close(fd)  # which it is, whatever it says
        self._fails("close")

    def fstat(self, fd: int) -> os.stat_result:
        self._fails("fstat")
        return os.fstat(fd)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        outcome = self._fails("preadv2" if flags else "preadv")
        (view,) = buffers
        length = {"": len(view), SHORT: _half(len(view)), NOTHING: 0}[outcome]
        return os.preadv(fd, (memoryview(view)[:length],), offset, flags)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        outcome = self._fails("pread")
        return os.pread(fd, {"": length, SHORT: _half(length), NOTHING: 0}[outcome], offset)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        outcome = self._fails("pwrite")
        length = {"": len(data), SHORT: _half(len(data)), NOTHING: 0}[outcome]
        return os.pwrite(fd, memoryview(data)[:length], offset)

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        outcome = self._fails("pwritev")
        if not outcome:
            return os.pwritev(fd, buffers, offset)
        data = b"".join(buffers)
        return os.pwrite(fd, data[: _half(len(data)) if outcome == SHORT else 0], offset)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        self._fails(_WHENCE[whence])
        return os.lseek(fd, offset, whence)

    def fdatasync(self, fd: int) -> None:
        self._fails("fdatasync")
        os.fdatasync(fd)

    def ftruncate(self, fd: int, size: int) -> None:
        self._fails("ftruncate")
        os.ftruncate(fd, size)

    def posix_fadvise(self, *args: Any) -> None:
        self._fails("posix_fadvise")
        os.posix_fadvise(*args)

    def sendfile(self, out: int, fd: int, offset: int, length: int) -> int:
        outcome = self._fails("sendfile")
        if outcome == NOTHING:
            return 0
        return os.sendfile(out, fd, offset, _half(length) if outcome else length)


def _foreign(host: Host, call: str, real: Callable[..., int]) -> Callable[..., int]:
    """A call of the C library, which gives -1 where it fails."""

    def called(*args: Any) -> int:
        outcome = host.outcome(call)
        if not outcome:
            return real(*args)
        ctypes.set_errno(getattr(errno, outcome))
        return -1

    return called


@contextmanager
def installed(host: Host) -> Iterator[None]:
    """Everything that is called of a disk inside is called of ``host``."""
    system: Any = _Os(host)

    def locked(fd: int, command: int, argument: bytes) -> Any:
        system._fails(_LOCKS[command])
        return fcntl.fcntl(fd, command, argument)

    locks = SimpleNamespace(**{name: getattr(fcntl, name) for name in dir(fcntl)})
    locks.fcntl = locked
    with ExitStack() as stack:
        for module in (engine, syscalls, stream):
            stack.enter_context(patch.object(module, "os", system))
        direct = engine._CALLS._replace(write=system.pwrite, truncate=system.ftruncate)
        stack.enter_context(patch.object(engine, "_CALLS", direct))
        stack.enter_context(patch.object(syscalls, "fcntl", locks))
        for module, name, call in (
            (engine, "syscall", "cachestat"),
            (syscalls, "_fallocate", "fallocate"),
            (syscalls, "_fstatfs", "fstatfs"),
        ):
            real = getattr(module, name)
            stack.enter_context(patch.object(module, name, _foreign(host, call, real)))
        yield
