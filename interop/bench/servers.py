"""Who serves: the same image, read-only, on a unix socket."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from interop import peers

TICK = os.sysconf("SC_CLK_TCK")
NAMES = ("pynbd", "qemu-nbd threads", "qemu-nbd io_uring", "nbdkit")


@dataclass(frozen=True)
class Server:
    name: str
    uri: str
    pid: int

    def cpu(self) -> float:
        """Seconds of processor time so far, user and system: proc_pid_stat(5), fields 14, 15."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


def command(name: str, image: Path, form: str, socket: Path) -> list[str]:
    program, _, aio = name.partition(" ")
    match program:
        case "pynbd":
            start = [sys.executable, "-m", "pynbd", "serve", "-r"]
            return [*start, "-k", str(socket), "-f", form, str(image)]
        case "qemu-nbd":
            start = [*peers.command("qemu-nbd"), "-r", "--persistent", "--shared=0"]
            return [*start, f"--aio={aio}", f"--socket={socket}", "-f", form, str(image)]
        case _:
            start = [*peers.command("nbdkit"), "--foreground", "--readonly"]
            return [*start, f"--unix={socket}", "file", str(image)]


@contextmanager
def serve(name: str, image: Path, form: str) -> Iterator[Server]:
    with (
        peers.socket_path() as socket,
        peers.listening(command(name, image, form, socket), socket) as process,
    ):
        yield Server(name, peers.unix_uri(socket), process.pid)
