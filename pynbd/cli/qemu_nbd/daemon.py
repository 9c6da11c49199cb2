"""A server in the background: ``--fork``, and the file with its process ID.

As qemu-nbd does it: the parent ends when the server is ready, or has failed; the child is the
leader of a session of its own, with /dev/null for standard input and output, and for standard error
too once it is ready. The pid file is readable for its owner only, locked as long as the process
lives, and stays behind it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
from contextlib import suppress
from typing import NoReturn

from pynbd.cli.signals import ENDING
from pynbd.errors import PynbdError

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len (0: all of it), l_pid.
_FLOCK = struct.Struct("hhqqi4x")
_READY = b"\1"


class Daemon:
    """The child, after `fork`. ``keep_errors``: standard error stays as it is for ever."""

    def __init__(self, ready: int, *, keep_errors: bool) -> None:
        self._ready = ready
        self._keep_errors = keep_errors

    @classmethod
    def fork(cls, *, keep_errors: bool) -> Daemon:
        """Go on in a child; the parent never returns. Call it before there are threads."""
        waiting, ready = os.pipe()
        if os.fork():
            os.close(ready)
            _wait(waiting)
        os.close(waiting)
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        return cls(ready, keep_errors=keep_errors)

    def ready(self) -> None:
        """Let the parent end."""
        if not self._keep_errors:
            os.dup2(1, 2)
        with suppress(BrokenPipeError):  # the parent was ended while it waited
            os.write(self._ready, _READY)
        os.close(self._ready)


def _wait(waiting: int) -> NoReturn:
    """End with the child's readiness, or with its end: it has told why."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    sys.exit(0 if os.read(waiting, 1) == _READY else 1)


def write_pid_file(path: str) -> None:
    """Write the ID of this process. Raises `PynbdError`, also if another process holds the file.

    The descriptor stays open until the process ends, and with it the lock.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        except BlockingIOError:
            os.close(fd)
            raise PynbdError(f"--pid-file: {path} is that of a process that lives") from None
        os.truncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
    except OSError as error:
        raise PynbdError(f"--pid-file: {path}: {error.strerror}") from None
