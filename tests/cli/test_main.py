"""``pynbd``: what it says of itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


def pynbd(*args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pynbd", *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)


def test_version() -> None:
    done = pynbd("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"pynbd, version {version('pynbd')}\n"


@pytest.mark.parametrize("args", [["-h"], ["--help"], ["serve", "-h"], ["serve", "--help"]])
def test_help(args: list[str]) -> None:
    done = pynbd(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: pynbd ")
    for word in ("serve",) if args[0] != "serve" else ("IMAGE", "-k", "-A", "-B", "Examples"):
        assert word in done.stdout


def test_closed_standard_descriptors() -> None:
    """What is opened never gets their numbers."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        uri = f"nbd://127.0.0.1:{deaf.getsockname()[1]}"
        line = ["sh", "-c", f'exec "{sys.executable}" -m pynbd ls {uri} <&- >&- 2>&-']
        with subprocess.Popen(line) as process:
            connection, _ = deaf.accept()
            with connection:
                opened = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
                process.terminate()
    assert opened == ["/dev/null"] * 3


def test_a_server_that_does_not_listen(tmp_path: Path) -> None:
    """A broken pipe that is a connection's is told."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "s"
        listener.bind(str(path))
        listener.listen()
        line = [sys.executable, "-m", "pynbd", "map", f"nbd+unix:///?socket={path}"]
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
            listener.settimeout(20)
            connection, _ = listener.accept()
            with connection:
                connection.shutdown(socket.SHUT_RD)
                connection.sendall(b"NBDMAGICIHAVEOPT\0\3")
                _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (1, f"pynbd: {line[-1]}: Broken pipe\n")


def test_no_arguments() -> None:
    """The help, for people."""
    done = pynbd()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: pynbd ")


def test_no_such_command() -> None:
    done = pynbd("sreve", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pynbd: no command 'sreve'; there are serve, info, ls, map, ")
