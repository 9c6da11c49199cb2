"""Formats that are guessed from the first bytes of a file, and a raw disk whose format was guessed:
nothing that a guest writes may make it look like another one to whoever guesses next.

Nothing is allowed: a write that would is EPERM, and leaves the file as it was.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.probe import PROBE_LENGTH, probe_format
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = ()
MAX_LEN = 2048
SMOKE = 250
DICTIONARY = (
    *(b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\1", b"QED\0", b"KDMV", b"COWD", b"conectix", b"vhdxfile"),
    *(b"\x7f\x10\xda\xbe", b"LUKS\xba\xbe", b"WithoutFreeSpace", b"koly", b"\n", b"#", b"\r\n"),
    *(b"# Disk DescriptorFile\n", b"version=1", b" version = 2\n"),
)
_FORMATS = {
    *("raw", "qcow", "qcow2", "qed", "vmdk", "vpc", "vhdx", "vdi", "luks", "parallels", "bochs"),
    *("cloop", "dmg"),
}
_MOST_REQUESTS = 8


def seeds() -> Iterable[bytes]:
    for word in DICTIONARY:
        for at in (0, 64):
            yield bytes([0, 0]) + b"\0" * 40
            yield bytes([1, 0, 0, at, 0, len(word) + 1]) + word
            yield bytes([0, 0, 0, 2, 0, 2]) + word[2:] + bytes([0, 0, 0, 0, 2]) + word[:2]
        yield bytes([3, len(word)]) + word + bytes([0, 0, 4, 0, 9]) + b"something"


def one_input(data: bytes) -> None:
    taking = Taking(data)
    before = taking.bytes(taking.number(2) % (PROBE_LENGTH + 1))
    assert probe_format(before) in _FORMATS
    path = disk.put(before.ljust(4096, b"\0"), "x.raw")
    if probe_format(path.read_bytes()[:PROBE_LENGTH]) == "raw":
        disk.run(_written(path, taking))


async def _written(path: disk.Path, taking: Taking) -> None:
    async with await open_image(
        path, read_only=False, engine=disk.engine(), cache=Cache.UNSAFE
    ) as node:
        for _ in range(_MOST_REQUESTS):
            if not taking:
                return
            kind, offset = taking.number(1) % 4, taking.number(2) % node.size
            length = min(taking.number(1) + 1, node.size - offset)
            before = path.read_bytes()
            refused: OSError | None = None
            after = bytearray(before)
            if kind < 2:
                data = taking.bytes(length)
                after[offset : offset + len(data)] = data
                if not data or node.write_now(offset, data):
                    continue
                (refused,) = await node.pwrite_batch([(offset, data)])
            else:
                after[offset : offset + length] = bytes(length)
                try:
                    await node.write_zeroes(offset, length, may_unmap=kind == 3, fast=False)
                except OSError as error:
                    refused = error
            looks_raw = probe_format(bytes(after[:PROBE_LENGTH])) == "raw"
            if refused:
                assert refused.errno == errno.EPERM
                assert not looks_raw
            else:
                assert looks_raw
            assert path.read_bytes() == (before if refused else after)
