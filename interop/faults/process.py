"""``pynbd serve`` as a process whose host runs out of things, and raw clients of it."""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from interop.conftest import serving
from tests.conformance.client import Mode, Peer


@dataclass(frozen=True)
class Served:
    """A server: where it listens, and which process it is."""

    socket: str
    pid: int

    def enter(self, mode: Mode = Mode.STRUCTURED, contexts: Sequence[str] = ()) -> Peer:
        """A client in transmission."""
        peer = Peer(self.socket)
        peer.negotiate(mode, contexts=contexts)
        return peer

    def limit(self, what: int, most: int) -> None:
        """Its soft limit ``what`` (RLIMIT_...), from now on; -1 is none."""
        _, hard = resource.prlimit(self.pid, what)
        resource.prlimit(self.pid, what, (hard if most < 0 else most, hard))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def address_space(self) -> int:
        """Bytes of it, as RLIMIT_AS counts them."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[0]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def mapped(self) -> str:
        """What it has mapped, a line each (proc_pid_maps(5))."""
        return Path(f"/proc/{self.pid}/maps").read_text()


@contextmanager
def served(
    image: str | Path, *args: str, says: str = "", under: Sequence[str] = ()
) -> Iterator[Served]:
    """As `serving`: in the end it has to leave with status 0, and to have said ``says``."""
    with serving(image, *args, says=says, under=under) as uri:
        yield Served(uri.partition("socket=")[2], served_by(uri))


def served_by(uri: str) -> int:
    """The process that listens there: unix(7), SO_PEERCRED."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(uri.partition("socket=")[2])
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])
