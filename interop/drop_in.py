"""qemu-nbd and what takes its place, started in the same way; the images that both serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from interop import peers, samples

REAL, OURS = "qemu-nbd", "pynbd-qemu-nbd"
PROGRAMS = (REAL, OURS)
ROOT = Path(__file__).parents[1]


def command(program: str, folder: Path | None = None) -> list[str]:
    """The start of a command line; ``folder``: where it runs."""
    line = (
        [sys.executable, "-m", "pynbd.qemu_nbd"] if program == OURS else peers.command("qemu-nbd")
    )
    if folder is None:
        return line
    return ["env", "-C", str(folder), f"PYTHONPATH={ROOT}", *line]


@dataclass
class Run:
    """A server that runs. ``status`` and ``said`` (standard output and error) are those of its
    end.
    """

    process: subprocess.Popen[bytes]
    uri: str
    status: int | None = None


@contextmanager
def running(program: str, *args: str | Path, folder: Path, export: str = "") -> Iterator[Run]:
    """The program on a unix socket, in ``folder``, until the end of the context: SIGTERM."""
    with peers.socket_path() as path:
        line = [*command(program, folder), f"--socket={path}", *map(str, args)]
        with peers.listening(line, path) as process:
            run = Run(process, peers.unix_uri(path, export))
            yield run
        run.status = process.returncode


def refused(
    program: str, *args: str | Path, folder: Path, timeout: float = 20
) -> subprocess.CompletedProcess[str]:
    """The program, with a command line that ends by itself."""
    line = [*command(program, folder), *map(str, args)]
    return subprocess.run(
        line,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def wait_until(true: Callable[[], bool], within: float = 10) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start(program: str, *args: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """To the end of the parent, with what it has printed. The server may stay."""
    said = folder / "said"
    with said.open("w") as stream:
        status = subprocess.run(
            [*command(program, folder), *map(str, args)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            timeout=20,
        ).returncode
    return subprocess.CompletedProcess(args, status, said.read_text())


def stop(pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(pid, number)
    wait_until(lambda: not alive(pid))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def alive(pid: int) -> bool:
    """Whether a process runs. One that has ended, and that nobody has waited for, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def images(folder: Path) -> None:
    """``disk.raw`` (data, zeroes, holes), ``odd.raw`` (1000 bytes), and a chain of qcow2 images:
    ``top.qcow2`` with two bitmaps and a snapshot, compressed ``middle.qcow2``, ``base.raw``; and
    ``flat.qcow2``, which has no backing file.
    """
    folder.mkdir(exist_ok=True)
    samples.sparse_file(folder / "disk.raw", 1 << 20)
    (folder / "odd.raw").write_bytes(os.urandom(1000))
    samples.chain(folder)
    top = folder / "top.qcow2"
    peers.run("qemu-img", "snapshot", "-c", "s1", top)
    samples.qemu_io(top, "write -q -P 22 3M 64k")
    flat = folder / "flat.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", flat, "1M")
    samples.qemu_io(flat, "write -q -P 23 64k 200k", "write -q -z 512k 64k")
