"""pynbd copy that cannot be done, fails half-way or is interrupted: what it says and leaves."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe
from interop.transferring import pynbd, pynbd_here

M = 1 << 20
HALF = 512 << 10


def broken(at: int, deed: str) -> Iterator[str]:
    """An export of 1 MiB, half of which cannot be read or written."""
    pread = f'[ $4 -lt {at} ] || {{ echo "EIO bad disk" >&2; exit 1; }}'
    scripts = {
        "read": [f"pread={pread}; head -c $3 /dev/zero | tr '\\0' x"],
        "write": ["pread=head -c $3 /dev/zero", f"pwrite={pread}; cat >/dev/null"],
    }
    return peers.nbdkit("eval", f"get_size=echo {M}", *scripts[deed])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"\x11" * M)
    return path


def test_reading_fails(source: Path, tmp_path: Path) -> None:
    """A new file goes away, a file that was there is told to be incomplete."""
    peers.require("nbdkit")
    new, old = tmp_path / "new", tmp_path / "old"
    with broken(HALF, "read") as uri:
        line = ["copy", "--request-size", "64k", "-R", "1", uri]
        reason = f"{uri}: cannot read 65536 bytes at offset {HALF}: "
        pynbd_here(*line, new, status=1, says=reason)
        assert not new.exists()
        old.write_bytes(b"old")
        pynbd_here(*line, old, status=1, says=f"; {old} is incomplete now\n")
        assert old.exists()
        pynbd_here("copy", uri, new, status=1, says="cannot read 262144 bytes at offset ")
        assert not new.exists()


def test_writing_fails(source: Path) -> None:
    peers.require("nbdkit")
    with broken(HALF, "write") as uri:
        line = ["copy", "--request-size", "64k", "-R", "1", source, uri]
        reason = f"{uri}: cannot write 65536 bytes at offset {HALF}: "
        pynbd_here(*line, status=1, says=reason)
        pynbd_here(*line, status=1, says=f"; {uri} is incomplete now\n")


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """As a limit of the size of files tells it."""
    new = tmp_path / "new"
    line = f'ulimit -f 512; exec "{sys.executable}" -m pynbd copy "{source}" "{new}"'
    done = subprocess.run(
        ["/bin/sh", "-c", line], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not new.exists()


def test_the_server_goes_away(source: Path, tmp_path: Path) -> None:
    peers.require("nbdkit")
    new = tmp_path / "new"
    with peers.nbdkit("--filter=exitwhen", "eval", f"get_size=echo {M}", "pread=kill $PPID") as uri:
        pynbd_here("copy", uri, new, status=1, says=f"{uri}: ")
    assert not new.exists()


def test_the_source_is_never_the_target(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io")
    top = samples.chain(tmp_path)
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(top)
    hard.hardlink_to(tmp_path / "base.raw")
    for target in top, tmp_path / "middle.qcow2", tmp_path / "base.raw", link, hard:
        pynbd_here("copy", "-O", "raw", top, target, status=2, says="the source")
    uri = pynbd_serve(tmp_path / "base.raw", "-f", "raw")
    pynbd_here("copy", uri, uri, status=2, says="is the source")
    assert {path: path.read_bytes() for path in contents} == contents


def test_other_formats_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    peers.require("qemu-img")
    for name in "qcow2", "vmdk", "vdi":
        target = tmp_path / f"target-{name}"
        peers.run("qemu-img", "create", "-q", "-f", name, target, "1M")
        before = target.read_bytes()
        pynbd_here("copy", source, target, status=1, says=f"looks like {name}; -O raw or -O qcow2")
        assert target.read_bytes() == before
        pynbd_here("copy", "-O", "raw", source, target)
        assert target.read_bytes() == source.read_bytes()


def test_locks(source: Path, tmp_path: Path) -> None:
    peers.require("qemu-nbd")
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * M)
    with peers.qemu_nbd(target, "-f", "raw"):
        pynbd("copy", source, target, status=1, says="another process uses it")
        assert target.read_bytes() == b"\xee" * M
        pynbd("copy", target, tmp_path / "new", status=1, says="--force-share")
        assert not (tmp_path / "new").exists()
    with peers.qemu_nbd(source, "-f", "raw"):
        pynbd("copy", "-U", source, target, says="another process writes this image")
    assert target.read_bytes() == source.read_bytes()


def test_targets_that_do_not_do(source: Path, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    small, whole = tmp_path / "small", tmp_path / "whole"
    before = b"\xee" * (M - 1)
    small.write_bytes(before)
    whole.write_bytes(before + b"\xee")
    pynbd_here("copy", source, pynbd_serve(whole, "-r"), status=1, says="read-only")
    small_uri = pynbd_serve(small, "-f", "raw", "-x", "y")
    pynbd_here("copy", source, small_uri, status=1, says=f"{M - 1} bytes, and the source has {M}")
    assert small.read_bytes() == before
    assert whole.read_bytes() == before + b"\xee"
    pynbd_here("copy", source, tmp_path, status=1, says="Is a directory")
    pynbd_here("copy", source, "/dev/null", status=1, says="not a regular file")
    pynbd_here("copy", source, tmp_path / "no" / "where", status=1, says="cannot be made")
    pynbd_here("copy", source, "nbd+unix:///?socket=/nowhere", status=1, says="No such file")
    pynbd_here("copy", source, "json:{}", status=2, says="protocol name")
    pynbd_here("copy", source, "-", status=2, says="./-")
    pynbd_here("copy", "-f", "raw", "nbd://localhost", tmp_path / "new", status=2, says="--format")
    pynbd_here("copy", "-S", "5000", source, tmp_path / "new", status=2, says="--sparse")
    assert not (tmp_path / "new").exists()


@contextmanager
def slow_copy(target: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A copy from a server whose answers do not come, that has begun."""
    with peers.nbdkit("--filter=delay", "pattern", "64M", "delay-read=60") as uri:
        line = [sys.executable, "-m", "pynbd", "copy", uri, str(target)]
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 20
            while not (target.exists() and target.stat().st_size == 64 * M):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            try:
                yield process
            finally:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(number: signal.Signals, tmp_path: Path) -> None:
    peers.require("nbdkit")
    target = tmp_path / "target"
    is_new = number != signal.SIGTERM
    if not is_new:
        target.write_bytes(b"old")
    with slow_copy(target) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    left = "" if is_new else f"; {target} is incomplete now"
    assert (process.returncode, said) == (128 + number, f"pynbd: interrupted{left}\n")
    assert target.exists() != is_new


def test_progress_on_a_terminal(source: Path, tmp_path: Path) -> None:
    """A bar where standard error is a terminal, unless it is not wanted; and elsewhere if it is."""
    target, line = tmp_path / "target", [sys.executable, "-m", "pynbd", "copy"]
    for option, there in (None, True), ("--no-progress", False):
        master, slave = pty.openpty()
        words = [*line, *([option] if option else []), str(source), str(target)]
        subprocess.run(words, check=True, stderr=slave, timeout=60)
        os.set_blocking(master, False)
        try:
            said = os.read(master, 1 << 16)
        except BlockingIOError:
            said = b""
        assert (b"100%" in said) == there
        os.close(master)
        os.close(slave)
    done = subprocess.run(
        [*line, "--progress", str(source), str(target)], check=True, capture_output=True, timeout=60
    )
    assert b"100%" in done.stderr
    assert done.stdout == b""
