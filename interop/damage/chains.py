"""Chains that are damaged as such: loops, odd files in the place of images, names that are none."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from interop.damages import CLUSTER, SIZE
from pynbd.block.qcow2.builder import Data, Image

TOP = "top.qcow2"
Make = Callable[[Path], Path]


def overlay(
    folder: Path, below: str | None, backing_format: str | None, name: str = TOP, **rest: str
) -> Path:
    """A sound image above ``below``; nothing is known of that."""
    image = Image(
        size=SIZE,
        cluster_bits=12,
        clusters={5 * CLUSTER: Data(b"above")},
        backing_file=below,
        backing_format=backing_format,
        data_file=rest.get("data_file"),
    )
    image.write(folder / name)
    return folder / name


@dataclass(frozen=True)
class ChainDamage:
    """One of ``_MADE``."""

    field: str
    value: str
    structure: str = "chain"
    harms: range | None = None

    @property
    def name(self) -> str:
        return f"chain/{self.field}/{self.value}"

    def place(self, folder: Path) -> Path:
        return _MADE[self.field, self.value](folder)


def _loop(length: int) -> Make:
    def make(folder: Path) -> Path:
        for number in range(length):
            overlay(folder, f"{(number + 1) % length}.qcow2", "qcow2", f"{number}.qcow2")
        return folder / "0.qcow2"

    return make


def _deep(layers: int) -> Make:
    def make(folder: Path) -> Path:
        for number in range(layers):
            below = f"{number + 1}.qcow2" if number + 1 < layers else None
            overlay(folder, below, "qcow2" if below else None, f"{number}.qcow2")
        return folder / "0.qcow2"

    return make


def _over(make_below: Callable[[Path], object], backing_format: str | None) -> Make:
    def make(folder: Path) -> Path:
        make_below(folder / "below")
        return overlay(folder, "below", backing_format)

    return make


def _named(below: str, backing_format: str | None) -> Make:
    return lambda folder: overlay(folder, below, backing_format)


def _with_data_file(make_data: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> Path:
        path = overlay(folder, None, None, data_file="data")
        (folder / "data").unlink()
        make_data(folder / "data")
        return path

    return make


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))


def _very_long(path: Path) -> None:
    path.touch()
    os.truncate(path, (1 << 43) - 4096)


def _symlink(to: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(to)


# In the place of a file.
_ODD: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _socket,
    "an empty file": Path.touch,
    "one byte": lambda path: path.write_bytes(b"Q"),
    "four bytes of qcow2": lambda path: path.write_bytes(b"QFI\xfb"),
    "a file that nobody may read": lambda path: path.touch(mode=0),
    "a link to itself": _symlink("below"),
    "a link to nowhere": _symlink("nowhere"),
    "a link to a file elsewhere": _symlink("/etc/passwd"),
    "a link to a device": _symlink("/dev/zero"),
    "a link to a terminal": _symlink("/dev/tty"),
    "a link to the image above": _symlink(TOP),
    "a very long file": _very_long,
    "an image of another format": lambda path: path.write_bytes(b"KDMV".ljust(512, b"\0")),
}
# Where no file can be.
_NAMES: dict[str, str] = {
    "a file elsewhere": "/etc/passwd",
    "a device": "/dev/zero",
    "nothing": "/dev/null",
    "a terminal": "/dev/tty",
    "standard input": "/dev/stdin",
    "memory of the process": "/proc/self/mem",
    "an endless file": "/proc/kmsg",
    "the folder above": "..",
    "itself": TOP,
    "itself, by its folder": "./" + TOP,
    "nbd": "nbd:localhost:10809",
    "nbd URI": "nbd+unix:///?socket=/tmp/s",
    "json": 'json:{"driver":"qcow2","file":{"driver":"file","filename":"/etc/passwd"}}',
    "json of another node": 'json:{"driver":"nbd","host":"localhost"}',
    "file URI": "file:///etc/passwd",
    "fat": "fat:/etc",
    "http": "http://localhost/",
    "ssh": "ssh://localhost/x",
    "a line that is broken": "a\nb",
    "signs that steer a terminal": "\x1b[2Jx",
}

_MADE: dict[tuple[str, str], Make] = {
    **{("loop", f"{length} images"): _loop(length) for length in (1, 2, 3, 50)},
    **{("depth", f"{layers} layers"): _deep(layers) for layers in (2, 50, 200, 201, 250)},
    **{
        (f"backing file, {backing_format or 'no format'}", name): _over(make, backing_format)
        for backing_format in ("raw", "qcow2", None)
        for name, make in _ODD.items()
    },
    **{
        (f"name of a backing file, {backing_format or 'no format'}", name): _named(
            below, backing_format
        )
        for backing_format in ("raw", "qcow2", None)
        for name, below in _NAMES.items()
    },
    **{
        ("format of a backing file", repr(backing_format)): _over(Path.touch, backing_format)
        for backing_format in ("", "vmdk", "json", "nbd", "qcow", "RAW", "x" * 15, "host_device")
    },
    **{
        ("data file", name): _with_data_file(make)
        for name, make in _ODD.items()
        if name != "a link to the image above"
    },
}
CHAINS = [ChainDamage(field, value) for field, value in _MADE]
