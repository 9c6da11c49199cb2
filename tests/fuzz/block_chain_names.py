"""The names that an image gives of its backing file and its data file (docs/interop/qcow2.rst,
"backing_file_offset", "Header extensions"), with `--untrusted` and without.

Allowed: `ImageError`, `UsageError`. No file is opened but those that the chain names, read from the
headers here for themselves; for an image from a stranger none outside of its directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from interop.damage.watching import Watch, named_files
from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Data, Image
from pynbd.errors import ImageError, UsageError
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = (ImageError, UsageError)
MAX_LEN = 300
SMOKE = 60
_NAMES = (
    *("base.raw", "base.qcow2", "x.qcow2", "sub/base.raw", "sub/../base.raw", "../outside", "link"),
    *("/dev/zero", "fifo", "", "sub", "file:base.raw", "json:{}", "nbd://h", "a\nb", "link.qcow2"),
    *("./base.raw", "\udcff", "/proc/self/fd/0", "x.data", "missing"),
)
DICTIONARY = tuple(os.fsencode(name) for name in _NAMES if name)
_FORMATS = (None, "raw", "qcow2", "vmdk", "", "file")
_watch = cache(Watch)


@cache
def _sandbox() -> Path:
    """A folder with images, and one file outside of it."""
    folder = disk.folder().resolve() / "names"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "base.raw", folder / "sub" / "base.raw", folder.parent / "outside"):
        path.write_bytes(b"\x11" * 4096)
    (folder / "x.data").write_bytes(bytes(4096))
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "link.qcow2").symlink_to(folder / "base.qcow2")
    os.mkfifo(folder / "fifo")
    base = Image(
        size=4096,
        cluster_bits=9,
        clusters={0: Data(b"base")},
        backing_file="base.raw",
        backing_format="raw",
    )
    base.write(folder / "base.qcow2")
    return folder


def seeds() -> Iterable[bytes]:
    for flags in (0, 2):
        for name in DICTIONARY:
            yield bytes([flags, 1, len(name)]) + name
    for flags in (1, 3, 9, 11):
        for name in (b"x.data", b"link", b"../out"):
            yield bytes([flags, 1, 0, len(name)]) + name
    for form in range(len(_FORMATS)):
        yield bytes([4, form, 8]) + b"base.raw"


def one_input(data: bytes) -> None:
    taking = Taking(data)
    flags, form = taking.number(1), taking.below(len(_FORMATS))
    has_data_file, untrusted, probe, stored = (bool(flags & 1 << bit) for bit in range(4))
    backing = taking.bytes(taking.number(1)).decode("utf-8", "surrogateescape")
    data_name = taking.bytes(taking.number(1)).decode("utf-8", "surrogateescape")
    path = _sandbox() / "x.qcow2"
    # Built with a name that a file can have, which is then changed into what was given.
    image = Image(
        size=4096,
        cluster_bits=12,
        clusters={} if has_data_file else {0: Data(b"top")},
        backing_file=backing or None,
        backing_format=_FORMATS[form],
        data_file="x.data" if has_data_file else None,
    )
    image.write(path)
    if has_data_file:
        built = path.read_bytes()
        name = os.fsencode(data_name)[:6].ljust(6, b"\0" if stored else b"x")
        path.write_bytes(built.replace(b"DATA\0\0\0\6x.data", b"DATA\0\0\0\6" + name, 1))
    allowed = {os.path.normpath(name) for name in named_files(path)}
    with _watch().on() as events:
        try:
            disk.run(_opened(path, untrusted=untrusted, probe=probe and not untrusted))
        finally:
            for event, name, writes in events:
                assert event == "open", (event, name)
                assert not writes, name
                if not name.startswith("/proc/self/fd/") or not untrusted:
                    assert os.path.normpath(name) in allowed, name


async def _opened(path: Path, *, untrusted: bool, probe: bool) -> None:
    node = await open_image(
        path, format="qcow2", engine=disk.engine(), untrusted=untrusted, probe_backing=probe
    )
    async with node:
        for layer in node.chain():
            for file in layer.files():
                really = os.readlink(f"/proc/self/fd/{file.fd}")
                assert not untrusted or really.startswith(f"{path.parent}/")
        await disk.explore(node)
