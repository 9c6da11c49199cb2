"""HeaderFields: one field at a time, at its place in the specification's header."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Image
from pynbd.block.qcow2.format import Autoclear, Incompatible
from pynbd.block.qcow2.header_fields import HeaderFields
from tests.block.qcow2.writing import bytes_of, header_of, host_file, watched

MiB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.qcow2"
    Image(size=MiB).write(path)
    return path


async def test_each_field_is_at_its_place_and_nothing_else_changes(path: Path) -> None:
    """Bytes 72 to 79 are incompatible_features, 88 to 95 autoclear_features, 48 to 59 the refcount
    table's offset and length in clusters (docs/interop/qcow2.rst, "Header").
    """
    expected = bytearray(bytes_of(path))
    expected[72:80] = (0b11).to_bytes(8, "big")
    expected[88:96] = (1).to_bytes(8, "big")
    expected[48:60] = (0x30000).to_bytes(8, "big") + (2).to_bytes(4, "big")
    with host_file(path, writable=True) as file:
        fields = HeaderFields(file, await header_of(path))
        await fields.set_incompatible(Incompatible.DIRTY, on=True)
        await fields.set_incompatible(Incompatible.CORRUPT, on=True)
        await fields.set_autoclear(Autoclear.BITMAPS)
        await fields.place_refcount_table(0x30000, 2 << 16)
        assert bytes_of(path) == expected
        await fields.set_incompatible(Incompatible.DIRTY, on=False)
        expected[79] = 0b10
        assert bytes_of(path) == expected


async def test_two_bits_at_the_same_time(path: Path) -> None:
    """One commit marks the image dirty while a request finds damage."""
    with host_file(path, writable=True) as file:
        fields = HeaderFields(file, await header_of(path))
        await asyncio.gather(
            fields.set_incompatible(Incompatible.DIRTY, on=True),
            fields.set_incompatible(Incompatible.CORRUPT, on=True),
        )
        assert fields.incompatible == Incompatible.DIRTY | Incompatible.CORRUPT
    assert (await header_of(path)).incompatible == Incompatible.DIRTY | Incompatible.CORRUPT


async def test_a_field_that_could_not_be_written_keeps_its_value(path: Path) -> None:
    with watched() as host:
        node = await open_image(path, read_only=False)
    assert node.file is not None
    fields = HeaderFields(node.file, await header_of(path))
    host.fail(0, errno.EIO, "write")
    with pytest.raises(OSError, match="Input/output error"):
        await fields.set_incompatible(Incompatible.DIRTY, on=True)
    assert fields.incompatible == Incompatible.NONE
    await node.close()
