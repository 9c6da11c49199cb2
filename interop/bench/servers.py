"""Who serves, and how: a server of its own for each measurement, one at a time on an image.

qemu-nbd runs with its default cache mode, writeback, which is what pynbd does too. A request to
discard is ignored by both, and no job sends one.
"""

from __future__ import annotations

import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from interop import peers
from interop.bench import tls

CPUCLOCK_SCHED = 2  # of the clocks of a process, the one that counts nanoseconds
PYNBD = "pynbd"
QEMU = "qemu-nbd threads", "qemu-nbd io_uring"
NBDKIT = "nbdkit file"
Address = str | tuple[str, int]


@dataclass(frozen=True)
class Way:
    """How an image is served."""

    form: str = "qcow2"
    read_only: bool = False
    tcp: bool = False
    tls: bool = False
    contexts: tuple[str, ...] = ()  # options of qemu-nbd and pynbd alike: -A, -B NAME


@dataclass(frozen=True)
class Server:
    name: str
    uri: str
    pid: int
    started: float  # seconds from the command to the first connection
    address: Address

    def processes(self) -> list[int]:
        """The server's process and its children."""
        found = [self.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found

    def cpu(self) -> float:
        """Seconds of processor time so far, user and system: the clock of clock_getcpuclockid(3),
        as the ticks of proc_pid_stat(5) are longer than a short answer takes.
        """
        return sum(time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED) for pid in self.processes())

    def peak(self) -> int:
        """The most bytes that were resident so far: proc_pid_status(5), VmHWM."""
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.processes()]
        return sum(int(text.partition("VmHWM:")[2].split()[0]) << 10 for text in status)


def command(name: str, image: Path, way: Way, address: Address, folder: Path) -> list[str]:
    """Arguments that serve an image; ``folder`` has the certificates where there are some."""
    program, _, aio = name.partition(" ")
    match program, address:
        case "nbdkit", (host, port):
            place = ["--ipaddr", host, "--port", str(port)]
        case "nbdkit", path:
            place = ["--unix", str(path)]
        case _, (host, port):
            place = ["-b", host, "-p", str(port)]
        case _, path:
            place = ["-k", str(path)]
    secure = tls.options(program, folder) if way.tls else []
    only = ["-r"] if way.read_only else []
    served = ["-f", way.form, *way.contexts, "--discard=ignore", str(image)]
    match program:
        case "pynbd":
            start = [str(Path(sysconfig.get_path("scripts")) / "pynbd"), "serve"]
            return [*start, *place, *secure, *only, *served]
        case "qemu-nbd":
            start = [*peers.command("qemu-nbd"), "--persistent", "--shared=0", f"--aio={aio}"]
            return [*start, *place, *secure, *only, *served]
        case _:
            start = [*peers.command("nbdkit"), "--foreground"]
            return [*start, *place, *secure, *only, "file", str(image)]


@contextmanager
def serve(name: str, image: Path, way: Way) -> Iterator[Server]:
    with (
        peers.socket_path() as path,
        tempfile.TemporaryFile() as said,
    ):
        address = ("127.0.0.1", free_port()) if way.tcp else str(path)
        if way.tls:
            tls.prepare(path.parent)
        line = command(name, image, way, address, path.parent)
        start = time.perf_counter()
        with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as process:
            try:
                while not connects(address):
                    if process.poll() is not None or time.perf_counter() > start + 20:
                        said.seek(0)
                        raise AssertionError(f"{line} does not listen: {said.read().decode()}")
                    time.sleep(0.001)
                started = time.perf_counter() - start
                where = tls.checked(uri(address)) if way.tls else uri(address)
                yield Server(name, where, process.pid, started, address)
            finally:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def uri(address: Address) -> str:
    match address:
        case (host, port):
            return f"nbd://{host}:{port}"
        case path:
            return peers.unix_uri(str(path))


def connected(address: Address) -> socket.socket:
    """A socket connected to the server; raises OSError."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    connection = socket.socket(family)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def connects(address: Address) -> bool:
    try:
        connected(address).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
