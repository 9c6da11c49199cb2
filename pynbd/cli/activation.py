"""Socket activation: listening sockets that whoever started this process has opened.

sd_listen_fds(3): they are the LISTEN_FDS descriptors from 3 on, if LISTEN_PID is this process.
"""

from __future__ import annotations

import errno
import os
import socket

from pynbd.errors import PynbdError, UsageError

_LISTEN_FDS_START = 3


def activated_sockets() -> list[socket.socket]:
    """The sockets, none without socket activation. Call it before anything else opens descriptors.

    The variables are cleared, so that no child takes them. Raises `UsageError` if LISTEN_FDS is not
    a number, `PynbdError` if a descriptor is not a listening socket.
    """
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    pid, count, _ = (os.environ.pop(name, "") for name in names)
    if pid != str(os.getpid()):
        return []
    if not count.isdecimal() or not int(count):
        raise UsageError(f"LISTEN_FDS={count!r}: the number of sockets is expected, 1 or more")
    return [_listener(fd) for fd in range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count))]


def _listener(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        reason = "open" if error.errno == errno.EBADF else "a socket"
        raise PynbdError(f"LISTEN_FDS: descriptor {fd} is not {reason}") from None
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise PynbdError(f"LISTEN_FDS: descriptor {fd} is a socket that does not listen")
    sock.set_inheritable(False)
    return sock
