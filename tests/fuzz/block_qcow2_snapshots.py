"""The snapshot table (docs/interop/qcow2.rst, "Snapshots"), of an image of either version.

Allowed: `CorruptImage`; and `UsageError`, for who asks for a snapshot by a key that there is not.
What is read can be written again, and then says the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pynbd.block.qcow2.format import MAX_OFFSET, MAX_SNAPSHOT_L1_BYTES
from pynbd.block.qcow2.header import Header, parse
from pynbd.block.qcow2.snapshots import EXTRA_V3, build, find, table_length
from pynbd.block.qcow2.snapshots import parse as parse_table
from pynbd.errors import CorruptImage, UsageError
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = (CorruptImage, UsageError)
MAX_LEN = 1024
DICTIONARY = (b"snapshot.id=", b"snapshot.name=", b",,", b"one", b"two", b"\0\0\0\x10")


def _header() -> Header:
    data, _ = disk.image("snapshots")
    return parse(data[:512], name="x", file_size=len(data))


def seeds() -> Iterable[bytes]:
    data, header = disk.image("snapshots")[0], _header()
    table = data[header.snapshots_offset :][:512]
    for number in (0, 1, 2, 3):
        for wanted in (b"one", b"snapshot.id=2,snapshot.name=two", b"snapshot.x=1"):
            yield bytes([number, len(wanted)]) + wanted + table


def one_input(data: bytes) -> None:
    taking = Taking(data)
    header = replace(_header(), nb_snapshots=taking.number(1))
    wanted = taking.bytes(taking.below(64)).decode("utf-8", "surrogateescape")
    snapshots = parse_table(taking.rest(), header, name="x")
    assert len(snapshots) == header.nb_snapshots
    for one in snapshots:
        assert min(one.l1_table_offset, one.l1_size, one.disk_size, one.vm_state_size) >= 0
        try:
            one.check(header, name="x")
        except CorruptImage:
            continue
        assert one.l1_table_offset % header.cluster_size == 0
        assert one.l1_size * 8 <= MAX_SNAPSHOT_L1_BYTES
        assert one.l1_table_offset + one.l1_size * 8 <= MAX_OFFSET
        assert one.disk_size <= one.l1_size << header.cluster_bits + header.layout.l2_bits
    table = build(snapshots)
    assert len(table) >= table_length(snapshots)
    again = parse_table(table, header, name="x")
    for one, other in zip(snapshots, again, strict=True):
        assert len(other.extra) >= EXTRA_V3
        assert replace(other, extra=b"") == replace(one, extra=b"")
    found = find(snapshots, wanted)
    assert found is None or any(found is one for one in snapshots)
