"""Other people's programs: where they are, and how a test runs them.

A peer is the machine's own program where that is recent enough, else the one in the tree that
``make peers`` builds (`rootfs.sh`). Either way it is one executable path that needs no special
environment. Nothing here knows pynbd, but where a newer Python has it (`python313`).

``python -m interop.peers`` prints where each peer was found, and with names only how each of those
is started; with ``--host`` it succeeds only if the machine's own are all recent enough, so that no
tree is wanted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pynbd"
TREE = Path(os.environ.get("PYNBD_PEERS") or CACHE / "trixie").absolute()

# The Debian package of each peer and the oldest version that speaks all of the protocol.
PEERS = {
    "qemu-img": ("qemu-utils", (8, 2)),
    "qemu-io": ("qemu-utils", (8, 2)),
    "qemu-nbd": ("qemu-utils", (8, 2)),
    "qemu-storage-daemon": ("qemu-system-common", (8, 2)),
    "nbdinfo": ("libnbd-bin", (1, 18)),
    "nbdcopy": ("libnbd-bin", (1, 18)),
    "nbdsh": ("python3-libnbd", (1, 18)),
    "nbdkit": ("nbdkit", (1, 36)),
    "fio": ("fio", (3, 30)),
    "python3": ("python3", (3, 13)),
}

# The virtual environment of that Python, which `make peers` makes beside an older one's.
NEWER = Path(__file__).parents[1] / ".venv-3.13"


class PeerMissing(LookupError):
    """No usable copy of a program. The text says what to install."""


def host_program(name: str) -> str | None:
    """The machine's own copy, where it is recent enough."""
    path = shutil.which(name)
    if path is None:
        return None
    said = subprocess.run(
        [path, "--version"], check=False, capture_output=True, text=True, timeout=20
    )
    version = re.search(r"(\d+)\.(\d+)", said.stdout)
    _, oldest = PEERS[name]
    return path if version and tuple(map(int, version.groups())) >= oldest else None


@cache
def find(name: str) -> str:
    """The path of a peer's executable; raises `PeerMissing`."""
    launcher = TREE / "peers" / name
    path = host_program(name) or (str(launcher) if os.access(launcher, os.X_OK) else None)
    if path is None:
        package, oldest = PEERS[name]
        version = ".".join(map(str, oldest))
        raise PeerMissing(f"{name} is missing: `make peers`, or install {package} >= {version}")
    return path


def command(name: str) -> list[str]:
    """The start of a command line that runs the peer; raises `PeerMissing`."""
    return [find(name)]


def python313() -> list[str]:
    """The start of a command line that runs Python >= 3.13 with this checkout's pynbd and all that
    its tests need: the running Python, if it is as new; raises `PeerMissing`.
    """
    if sys.version_info >= (3, 13):
        return [sys.executable]
    python = NEWER / "bin/python"
    if not (NEWER / "tested").exists() or not os.access(python, os.X_OK):
        raise PeerMissing("a Python >= 3.13 with pynbd is missing: `make peers`")
    return [str(python)]


def require(*wanted: str | Callable[[], object]) -> None:
    """Skip the running test where a peer is missing; with ``CI=true`` that is a failure.

    A peer is named, or is what finds it: ``require("nbdinfo", python313)``.
    """
    for want in wanted:
        try:
            find(want) if isinstance(want, str) else want()
        except PeerMissing as missing:
            if os.environ.get("CI") == "true":
                pytest.fail(str(missing))
            pytest.skip(str(missing))


def run(
    name: str,
    *args: str | Path,
    check: bool = True,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a peer to its end; an AssertionError shows what it said, if ``check`` and it failed."""
    line = [*command(name), *map(str, args)]
    done = subprocess.run(
        line, check=False, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        shown = " ".join([name, *line[1:]])
        raise AssertionError(f"{shown}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def nbdsh(script: str, uri: str | None = None, timeout: float = 60) -> str:
    """Run Python with a libnbd handle ``h``, connected to ``uri`` if one is given; its output."""
    connect = ["--uri", uri] if uri else []
    return run("nbdsh", *connect, "-c", script, timeout=timeout).stdout


def fio(uri: str, *args: str, timeout: float = 60) -> dict[str, Any]:
    """Run one fio job against a URI; what its JSON report says of the job."""
    job = ["--name=job", "--ioengine=nbd", f"--uri={uri}", *args, "--output-format=json"]
    report = run("fio", *job, timeout=timeout).stdout
    jobs: list[dict[str, Any]] = json.loads(report[report.index("{") :])["jobs"]
    return jobs[0]


def unix_uri(path: str | Path, export: str = "") -> str:
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(path))}"


@contextmanager
def socket_path() -> Iterator[Path]:
    """A path short enough for a unix socket (108 bytes), in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="nbd-", dir="/tmp") as folder:
        yield Path(folder) / "s"


@contextmanager
def listening(line: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until its unix socket takes a connection, end it by its pid."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as process,
    ):
        try:
            deadline = time.monotonic() + 20
            while not connects(path):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise AssertionError(f"{line} does not listen: {said.read().decode()}")
                time.sleep(0.005)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def qemu_nbd(image: str | Path, *args: str, export: str = "") -> Iterator[str]:
    """Serve an image with qemu-nbd to any number of clients; the URI."""
    with socket_path() as path:
        line = ["--persistent", "--shared=0", f"--socket={path}", f"--export-name={export}"]
        with listening([*command("qemu-nbd"), *line, *args, str(image)], path):
            yield unix_uri(path, export)


@contextmanager
def nbdkit(*args: str) -> Iterator[str]:
    """Serve a plugin of nbdkit: ``nbdkit("file", path)``, ``nbdkit("memory", "1G")``; the URI."""
    with socket_path() as path:
        line = ["--foreground", "--exit-with-parent", f"--unix={path}"]
        with listening([*command("nbdkit"), *line, *args], path):
            yield unix_uri(path)


def main(arguments: list[str]) -> int:
    if arguments == ["--host"]:
        return 0 if all(map(host_program, PEERS)) else 1
    for name in arguments:
        print(*(python313() if name == "python313" else command(name)))
    if arguments:
        return 0
    missing = 0
    for name in PEERS:
        try:
            print(f"{name:20} {find(name)}")
        except PeerMissing as reason:
            print(f"{name:20} {reason}")
            missing = 1
    return missing


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PeerMissing as missing:
        sys.exit(str(missing))
