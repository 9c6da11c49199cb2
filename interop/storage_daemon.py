"""qemu-storage-daemon as a peer: block nodes that are NBD clients, block jobs, exports of its own.

Nothing here knows pynbd.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from interop import peers


class Qmp:
    """A QEMU Machine Protocol session: `execute` commands, `wait` for events."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._events: list[dict[str, Any]] = []
        self._receive()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """What the command returns. A keyword's ``_`` is QMP's ``-``."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": names}) + "\n")
        self._stream.flush()
        while "event" in (said := self._receive()):
            self._events.append(said)
        assert "return" in said, said
        return said["return"]

    def wait(self, event: str, **data: object) -> dict[str, Any]:
        """The data of the next event of that name whose data is at least ``data``."""
        while True:
            said = self._events.pop(0) if self._events else self._receive()
            if said["event"] == event and data.items() <= said["data"].items():
                found: dict[str, Any] = said["data"]
                return found

    def _receive(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self._stream.readline())
        return said


@contextmanager
def running(
    folder: Path, *blockdevs: str, export: str, writable: bool = True
) -> Iterator[tuple[Qmp, str]]:
    """A daemon with these block nodes, of which it serves the node ``export``: QMP, and the URI.

    ``folder`` holds its sockets: its path must be short.
    """
    monitor, nbd = folder / "qmp", folder / "nbd"
    access = "on" if writable else "off"
    line = [
        *peers.command("qemu-storage-daemon"),
        *(word for blockdev in blockdevs for word in ("--blockdev", blockdev)),
        *("--nbd-server", f"addr.type=unix,addr.path={nbd},max-connections=0"),
        *("--export", f"type=nbd,id=export,node-name={export},name=,writable={access}"),
        *("--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
    ]
    # It obeys its options in their order: when the monitor listens, all is there.
    with peers.listening(line, monitor), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(monitor))
        with connection.makefile("rw") as stream:
            yield Qmp(stream), peers.unix_uri(nbd)


def nbd_client(uri: str, node: str, *options: str) -> str:
    """The ``--blockdev`` of a node that is a client of a server on a unix socket."""
    path = uri.partition("socket=")[2]
    server = ["server.type=unix", f"server.path={path}"]
    return ",".join(["driver=nbd", f"node-name={node}", *server, *options])
