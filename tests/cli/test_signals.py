"""Signals end ``pynbd serve`` at every moment of its life, with status 0 and no word, and it leaves
nothing behind.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import peers

M = 1 << 20
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
both_loops = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(M))
    return path


@contextmanager
def process(
    disk: Path, *options: str | Path, ignored: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """The server as a process; ``ignored``: SIGINT and SIGQUIT, as shells start what is in the
    background.
    """
    line = [sys.executable, "-m", "pynbd", "serve", *map(str, options), str(disk)]
    if ignored:
        line = ["sh", "-c", 'trap "" INT QUIT; exec "$@"', "-", *line]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def ready(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    assert server.stdout.readline().startswith("nbd")


def ended(server: subprocess.Popen[str], within: float = 10) -> None:
    said, errors = server.communicate(timeout=within)
    assert (server.returncode, errors) == (0, "")
    assert said == "" or said.startswith("nbd")


def watches(server: subprocess.Popen[str]) -> bool:
    """Whether its own code has begun: that blocks the signals first of all."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return all(int(blocked, 16) >> number - 1 & 1 for number in ENDING)


@pytest.mark.parametrize(
    "number, later",
    [*((number, 0) for number in ENDING), *zip(ENDING, (0.03, 0.08, 0.15, 0.2), strict=True)],
)
def test_while_it_starts(disk: Path, number: signal.Signals, later: float) -> None:
    """While it imports, while it opens the image, and when it has just begun to listen."""
    with peers.socket_path() as path:
        with process(disk, "-k", path) as server:
            while not watches(server):
                time.sleep(0.001)
            if not later:
                maps = Path(f"/proc/{server.pid}/maps").read_text()
                assert "numpy" not in maps  # what takes long to import is yet to come
            time.sleep(later)
            server.send_signal(number)
            ended(server)
        assert not path.exists()


@both_loops
@pytest.mark.parametrize(
    "number, later, at_once",
    [
        (signal.SIGTERM, 0, False),
        (signal.SIGINT, 0.001, False),
        (signal.SIGHUP, 0.8, False),
        (signal.SIGTERM, 1.2, True),
        (signal.SIGQUIT, 1.2, True),
    ],
)
def test_a_second_one(
    disk: Path, loop: str, number: signal.Signals, later: float, at_once: bool
) -> None:
    """After a second it waits for no client, until then it is the first one; no socket is left."""
    with peers.socket_path() as path:
        with (
            process(disk, "--loop", loop, "-k", path) as server,
            socket.socket(socket.AF_UNIX) as client,
        ):
            ready(server)
            client.connect(str(path))
            client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
            assert client.recv(18 + 10, socket.MSG_WAITALL)
            client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, M) * 64)
            time.sleep(0.1)
            server.send_signal(signal.SIGTERM)
            start = time.monotonic()
            time.sleep(later)
            assert server.poll() is None
            server.send_signal(number)
            ended(server)
            assert (time.monotonic() - start < 1.8) == at_once  # requests have two seconds
        assert not path.exists()


@both_loops
def test_a_hail_of_them(disk: Path, loop: str) -> None:
    """From the first byte of output to the last breath."""
    with peers.socket_path() as path:
        with process(disk, "--loop", loop, "-k", path) as server:
            ready(server)
            deadline = time.monotonic() + 10
            while server.poll() is None and time.monotonic() < deadline:
                for number in ENDING:
                    server.send_signal(number)
                time.sleep(0.0005)
            ended(server)
        assert not path.exists()


@both_loops
def test_after_a_shell_that_ignores_them(disk: Path, loop: str) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT):
        with process(disk, "--loop", loop, "-p", "0", ignored=True) as server:
            ready(server)
            server.send_signal(number)
            ended(server)


def test_nohup(disk: Path) -> None:
    """It outlives the terminal."""
    line = ["nohup", sys.executable, "-m", "pynbd", "serve", "-p", "0", str(disk)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        ready(server)
        server.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert server.poll() is None
        server.terminate()
        assert server.wait(10) == 0


def test_other_subcommands_end_as_programs_do() -> None:
    """Who asks for the version and interrupts it is not told that it went well."""
    line = [sys.executable, "-c", "import pynbd.__main__, time; print(flush=True); time.sleep(9)"]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        other.terminate()
        assert other.wait(10) == -signal.SIGTERM


def test_the_socket_of_another_server_stays(disk: Path, tmp_path: Path) -> None:
    """It was started under the same path while the first one was still there."""
    with peers.socket_path() as path, process(disk, "-k", path) as server:
        ready(server)
        path.unlink()
        with socket.socket(socket.AF_UNIX) as another:
            another.bind(str(path))
            server.terminate()
            ended(server)
            assert path.is_socket()


def test_a_socket_that_somebody_removed(disk: Path) -> None:
    with peers.socket_path() as path, process(disk, "-k", path) as server:
        ready(server)
        path.unlink()
        server.terminate()
        ended(server)


def test_output_that_cannot_be_written(disk: Path) -> None:
    """Its socket goes with it."""
    with peers.socket_path() as path, open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "pynbd", "serve", "-k", str(path), str(disk)]
        done = subprocess.run(
            line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False
        )
        assert done.returncode == 1
        assert os.strerror(28) in done.stderr
        assert "Traceback" not in done.stderr
        assert not path.exists()


def test_no_thread_to_wait_for_them(disk: Path) -> None:
    """There is no room for its stack: one line, and status 1."""
    program = "import runpy, threading; threading.stack_size(1 << 46);"
    program += "runpy.run_module('pynbd', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", program, "serve", str(disk)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
    said = "pynbd: the host lets no thread start, and it takes one to wait for signals\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
