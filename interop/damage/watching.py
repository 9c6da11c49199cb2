"""What a process does to files while it is watched, and how much memory that takes."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MiB = 1 << 20
MOST_MEMORY = 256 * MiB
_LONGEST_DIGEST = 64 * MiB  # of longer, sparse ones length and time tell enough
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Events (docs.python.org, "Audit events table") that change something, or leave the process.
_DEEDS = frozenset(
    {
        *(f"os.{deed}" for deed in ("remove", "rename", "mkdir", "rmdir", "truncate", "utime")),
        *(f"os.{deed}" for deed in ("chmod", "chown", "link", "symlink", "setxattr", "mknod")),
        *(f"os.{deed}" for deed in ("system", "exec", "posix_spawn", "fork", "forkpty")),
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
        "subprocess.Popen",
        "socket.connect",
        "socket.getaddrinfo",
    }
)


class Watch:
    """Every open, and every deed, of this process; there is one of it, as hooks never go."""

    def __init__(self) -> None:
        self._events: list[tuple[str, str, bool]] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if self._events is None or not (event == "open" or event in _DEEDS):
            return
        what = args[1] if event == "socket.connect" else args[0] if args else ""
        if isinstance(what, int):
            return  # of a descriptor that is open
        writes = event != "open"
        if event == "open":
            mode, flags = args[1], args[2]
            writes = isinstance(flags, int) and bool(flags & WRITES)
            writes |= isinstance(mode, str) and bool(set(mode) & set("wax+"))
        named = os.fsdecode(what) if isinstance(what, str | bytes | os.PathLike) else repr(what)
        self._events.append((event, named, writes))

    @contextmanager
    def on(self) -> Iterator[list[tuple[str, str, bool]]]:
        """The list that (event, path, whether it is to write) are added to."""
        events: list[tuple[str, str, bool]] = []
        self._events = events
        try:
            yield events
        finally:
            self._events = None


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    """What there is in a folder, and what its files hold."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        digest = ""
        if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _LONGEST_DIGEST:
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()
        where = str(path.relative_to(folder))
        found[where] = (
            status.st_mode,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            digest,
        )
    return found


def reset_peak() -> int:
    """Begin to measure the peak of resident memory anew; what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak() -> int:
    """The peak since then, in bytes."""
    return _memory("VmHWM")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    raise LookupError(name)


def named_files(top: Path) -> set[str]:
    """The paths that a chain names, and no others may be opened: read from the bytes of each header
    by the specification ("Header", "Header extensions").
    """
    allowed: set[str] = set()
    waiting = [os.fspath(top)]
    while waiting:
        path = waiting.pop()
        if path not in allowed:
            allowed.add(path)
            waiting += _named_by(path)
            allowed.update(data_files(path))
    return allowed


def _first_bytes(path: str) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    try:
        return os.read(file, 2 * MiB)
    except OSError:
        return b""
    finally:
        os.close(file)


def _named_by(path: str) -> Iterator[str]:
    data = _first_bytes(path)
    if data[:4] != b"QFI\xfb":
        return
    at, length = int.from_bytes(data[8:16]), int.from_bytes(data[16:20])
    if at and length <= 1023:
        yield os.path.join(os.path.dirname(path), os.fsdecode(data[at : at + length]))


def data_files(path: str) -> Iterator[str]:
    """The external data file that a header names, as it is and beside it."""
    data = _first_bytes(path)
    if data[:4] != b"QFI\xfb" or data[4:8] != b"\0\0\0\3":
        return
    at = int.from_bytes(data[100:104])
    while at + 8 <= len(data):
        kind, length = int.from_bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8])
        if kind == 0:
            return
        if kind == 0x44415441:
            name = os.fsdecode(data[at + 8 : at + 8 + length])
            yield name
            yield os.path.join(os.path.dirname(path), name)
        at += 8 + -(-length // 8) * 8
