"""The first cluster of a qcow2 file (docs/interop/qcow2.rst, "Header" to "Header padding").

Allowed: `CorruptImage` and `UnsupportedFeature`, which refuse the image in one line. Of what is let
through, every table is aligned, within the limits, and ends below 2^63; written again it says the
same, or does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pynbd.block.qcow2.extensions import Extension
from pynbd.block.qcow2.format import (
    MAX_L1_BYTES,
    MAX_OFFSET,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
)
from pynbd.block.qcow2.header import encode, parse
from pynbd.errors import CorruptImage, UnsupportedFeature, UsageError
from tests.fuzz import disk

ALLOWED = (CorruptImage, UnsupportedFeature)
MAX_LEN = 1024
DICTIONARY = (
    *(b"QFI\xfb", b"\xe2\x79\x2a\xca", b"\x68\x03\xf8\x57", b"\x23\x85\x28\x75"),
    *(b"\x05\x37\xbe\x77", b"DATA", b"raw", b"qcow2"),
)


def seeds() -> Iterable[bytes]:
    for name in disk.NAMES:
        yield disk.image(name)[0][:512]
    more = disk.IMAGES["plain"]
    named = replace(
        more,
        feature_names={(0, 0): "dirty bit", (1, 0): "lazy"},
        extensions=[Extension(0x12345678, b"whatever")],
    )
    path = disk.folder() / "seed.qcow2"
    named.write(path)
    yield path.read_bytes()[:512]


def one_input(data: bytes) -> None:
    header = parse(data, name="x", file_size=len(data))
    size = header.cluster_size
    assert 512 <= size <= 2 << 20
    for offset, length, most in (
        (header.l1_table_offset, header.l1_size * 8, MAX_L1_BYTES),
        (
            header.refcount_table_offset,
            header.refcount_table_clusters * size,
            MAX_REFCOUNT_TABLE_BYTES,
        ),
        (header.snapshots_offset, header.nb_snapshots * 40, MAX_SNAPSHOTS * 40),
    ):
        assert offset % size == 0
        assert length <= most
        assert offset + length <= MAX_OFFSET
    reached = header.l1_size << (header.cluster_bits + header.layout.l2_bits)
    assert header.virtual_size <= header.size <= reached
    assert header.virtual_size % 512 == 0
    assert header.refcount_bits in (1, 2, 4, 8, 16, 32, 64)
    assert (header.bitmaps is None) or header.bitmaps.directory_offset % size == 0
    try:
        again = encode(header)
    except UsageError:
        return  # padding was left out, or names are written with it
    assert len(again) == size
    told = parse(again, name="x", file_size=size)
    assert replace(told, header_length=0, additional_fields=b"") == replace(
        header, header_length=0, additional_fields=b""
    )
    assert told.additional_fields.rstrip(b"\0") == header.additional_fields.rstrip(b"\0")
