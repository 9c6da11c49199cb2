"""Faults below Python: strace(1) lets system calls of a real server fail, those on its image alone.

Here EINTR is real: whoever interrupts a call sees nothing of it. What fails is told to the client
whose request it was, and the rest of a fixed list of requests is answered as if nothing was.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from interop import peers
from interop.faults.process import served
from pynbd.block.qcow2.builder import Data, Image
from tests.conformance.client import Cmd, Errno

KiB, MiB = 1 << 10, 1 << 20
C = 64 * KiB
NOISE = random.Random(8).randbytes(MiB)


class Asked(NamedTuple):
    name: str
    command: int
    offset: int = 0
    length: int = 0
    payload: bytes = b""


REQUESTS = [
    Asked("read", Cmd.READ, 100, 4 * KiB),
    Asked("sent", Cmd.READ, 0, 12 * C),
    Asked("cold", Cmd.READ, 12 * C, 2 * C),
    Asked("status", Cmd.BLOCK_STATUS, 0, MiB),
    Asked("write", Cmd.WRITE, 100, 0, NOISE[: 4 * KiB]),
    Asked("long", Cmd.WRITE, 2 * C, 0, NOISE[: 5 * C]),
    Asked("flush", Cmd.FLUSH),
    Asked("zeroes", Cmd.WRITE_ZEROES, 8 * C, C),
    Asked("trim", Cmd.TRIM, 9 * C, C),
    Asked("flush-2", Cmd.FLUSH),
    Asked("write-2", Cmd.WRITE, 10 * C, 0, NOISE[:C]),
    Asked("last", Cmd.READ, 0, 8 * C),
]


def raw(folder: Path) -> Path:
    (folder / "x.raw").write_bytes(NOISE)
    return folder / "x.raw"


def qcow2(folder: Path) -> Path:
    """Half of it is in a backing file."""
    raw(folder).rename(folder / "base.raw")
    clusters = {at: Data(NOISE[at : at + C]) for at in range(0, MiB, 2 * C)}
    backing = {"backing_file": "base.raw", "backing_format": "raw"}
    Image(size=MiB, clusters=clusters, **backing).write(folder / "x.qcow2")  # type: ignore[arg-type]
    return folder / "x.qcow2"


@cache
def missing() -> str:
    """Why strace cannot be used, or ""."""
    if not shutil.which("strace"):
        return "there is no strace"
    done = subprocess.run(["strace", "-o/dev/null", "true"], check=False, capture_output=True)
    return "nothing can be traced here" if done.returncode else ""


# What is injected, and the errors that come of it. A call that fails may be made once more, another
# way: what is to be seen fails each time.
INTERRUPTED = "pread64,preadv,preadv2,pwrite64,pwritev,fallocate,fdatasync,ftruncate,sendfile,fcntl"
WRITES, ZEROES, FLUSHES = ("write", "long", "write-2"), ("zeroes", "trim"), ("flush", "flush-2")
CASES: dict[str, tuple[Callable[[Path], Path], str, dict[str, int]]] = {
    "raw-EINTR": (raw, f"{INTERRUPTED}:error=EINTR:when=1+2", {}),
    "qcow2-EINTR": (qcow2, f"{INTERRUPTED}:error=EINTR:when=1+2", {}),
    "raw-no-locks": (raw, "fcntl:error=ENOLCK", {}),
    "raw-socket-full": (raw, "sendfile:error=EAGAIN:when=1+2", {}),
    "raw-send-file": (raw, "sendfile:error=EIO", {"sent": Errno.EIO}),
    "raw-read": (raw, "pread64:error=EIO", dict.fromkeys(("cold", "last"), Errno.EIO)),
    "raw-write-EIO": (raw, "pwrite64:error=EIO", dict.fromkeys(WRITES, Errno.EIO)),
    "raw-write-ENOSPC": (raw, "pwrite64:error=ENOSPC", dict.fromkeys(WRITES, Errno.ENOSPC)),
    "raw-write-EDQUOT": (raw, "pwrite64:error=EDQUOT", dict.fromkeys(WRITES, Errno.ENOSPC)),
    "raw-fallocate": (raw, "fallocate:error=EFBIG", dict.fromkeys(ZEROES, Errno.ENOSPC)),
    "raw-no-fallocate": (raw, "fallocate:error=EOPNOTSUPP", {}),
    "raw-flush": (
        raw,
        "fdatasync:error=EIO:when=1",
        dict.fromkeys((*FLUSHES, *ZEROES, "write-2"), Errno.EIO),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_that_fail(name: str, tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    make, injected, expected = CASES[name]
    path = make(tmp_path)
    calls = injected.partition(":")[0]
    # As a grandchild (-D), so that signals reach the server.
    under = ["strace", "-D", "-f", "-o", str(tmp_path / "calls"), "-P", str(path)]
    under += ["-e", f"trace={calls}", "-e", f"inject={injected}"]
    disk = bytearray(NOISE)
    says, form = "(pynbd: .*\n)*", path.suffix[1:]
    with (
        served(path, "-f", form, says=says, under=under) as server,
        server.enter(contexts=["base:allocation"]) as peer,
    ):
        for one in REQUESTS:
            if one.name == "cold":
                make_cold(path)
            _, command, offset, length, payload = one
            reply = peer.ask(command, offset, length, payload=payload)
            assert reply.error == expected.get(one.name, Errno.OK), one.name
            if reply.error:
                continue
            if command == Cmd.READ:
                assert reply.data == disk[offset : offset + length]
            elif command == Cmd.WRITE:
                disk[offset : offset + len(payload)] = payload
            elif command == Cmd.WRITE_ZEROES:
                disk[offset : offset + length] = bytes(length)
    assert "INJECTED" in (tmp_path / "calls").read_text()
    if path.suffix == ".qcow2":
        peers.require("qemu-img")
        peers.run("qemu-img", "check", path)


def make_cold(path: Path) -> None:
    """Nothing of it is in the page cache any more."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_nothing_of_an_image_is_mapped(tmp_path: Path) -> None:
    """No call maps a page of it."""
    if missing():
        pytest.skip(missing())
    path, calls = qcow2(tmp_path), tmp_path / "calls"
    under = ["strace", "-D", "-f", "-y", "-o", str(calls), "-e", "trace=mmap,openat"]
    with served(path, under=under) as server, server.enter() as peer:
        for _, command, offset, length, payload in REQUESTS:
            if command != Cmd.BLOCK_STATUS:
                assert peer.ask(command, offset, length, payload=payload).error == Errno.OK
    told = calls.read_text().splitlines()
    assert any(str(path) in line for line in told if "openat" in line)
    assert not [line for line in told if "mmap(" in line and str(tmp_path) in line]
