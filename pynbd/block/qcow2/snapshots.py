"""The internal snapshot table (docs/interop/qcow2.rst, "Snapshots")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pynbd.block.engine import HostFile
from pynbd.block.limits import ChainMemory
from pynbd.block.qcow2.cache import read_up_to
from pynbd.block.qcow2.extensions import to_bytes
from pynbd.block.qcow2.format import (
    L1E_SIZE,
    MAX_OFFSET,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    SNAPSHOT_ENTRY,
    SNAPSHOT_EXTRA,
)
from pynbd.block.qcow2.header import Header
from pynbd.errors import CorruptImage, UsageError

# Bytes of extra data that version 3 demands: vm_state_size and disk_size.
EXTRA_V3 = SNAPSHOT_EXTRA.vm_state_size.sizeof() + SNAPSHOT_EXTRA.disk_size.sizeof()
# As declared: there may be very many.
ENTRY = struct.Struct(">QIHHIIQII")
EXTRA = struct.Struct(">QQQ")
# What a snapshot takes in memory besides the bytes of its entry.
_ENTRY_BYTES = 512
_MAX_ENTRY = SNAPSHOT_ENTRY.sizeof() + MAX_SNAPSHOT_EXTRA + 2 * 0xFFFF + 7
# Characters of an ID.
_SHOWN = 80
_NANOSECONDS = 10**9
_MAX_DATE_SEC = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot. Sizes in bytes, times in nanoseconds."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int  # entries
    disk_size: int  # virtual size when it was taken; the image's if the table does not say
    vm_state_size: int
    date: int  # since the Epoch
    vm_clock: int  # time that the guest had been running
    icount: int | None
    extra: bytes  # extra data as stored, known fields included

    def __str__(self) -> str:
        """For a line, of which there may be a thousand; an ID may have 64 KiB."""
        return f"snapshot {self.id[:_SHOWN]!r}" + "..." * (len(self.id) > _SHOWN)

    def check(self, header: Header, *, name: str) -> None:
        """Raise `CorruptImage` if its L1 table is misplaced, too large, or too small for its disk.

        Apart from `parse`, because a bad snapshot is no reason not to open the others.
        """
        if self.l1_table_offset % header.cluster_size:
            problem = f"is at {self.l1_table_offset:#x}, which is not aligned to a cluster"
        elif self.l1_size * L1E_SIZE > MAX_SNAPSHOT_L1_BYTES:
            problem = f"has {self.l1_size} entries; {MAX_SNAPSHOT_L1_BYTES // L1E_SIZE} are allowed"
        elif self.l1_table_offset + self.l1_size * L1E_SIZE > MAX_OFFSET:
            problem = f"is at {self.l1_table_offset:#x}, and would end beyond 2^63 - 1"
        elif self.disk_size > self.l1_size << (header.cluster_bits + header.layout.l2_bits):
            # QEMU would serve it. With that the size is bounded too, as `l1_size` is: by 2^61.
            problem = f"has {self.l1_size} entries, too few for a disk of {self.disk_size} bytes"
        else:
            return
        raise CorruptImage(f"{name}: the L1 table of the {self} {problem}")


async def load(
    file: HostFile, header: Header, memory: ChainMemory | None = None, *, padded: bool = False
) -> list[Snapshot]:
    """The internal snapshots of the image in ``file``. ``padded``: as far as the table is past the
    end of the file, it reads as zeroes. Raises `CorruptImage`, or `ImageError` if they would need
    too much ``memory``.
    """
    if not header.nb_snapshots:
        return []
    length = min(header.nb_snapshots * _MAX_ENTRY, MAX_SNAPSHOT_TABLE_BYTES)
    there = max(min(length, file.size() - header.snapshots_offset), 0)
    if memory is not None:
        memory.take(header.nb_snapshots * _ENTRY_BYTES, "snapshot table", file.path)
    data = await read_up_to(file, there, header.snapshots_offset)
    if padded:
        data = data.ljust(length, b"\0")
    known = parse(data, header, name=file.path)
    if memory is not None:
        memory.take(table_length(known), "snapshot table", file.path)
    return known


def parse(data: bytes | bytearray, header: Header, *, name: str) -> list[Snapshot]:
    """The ``header.nb_snapshots`` snapshots in ``data``, the bytes from
    ``header.snapshots_offset`` on.

    ``data`` may go on beyond the table, and needs no more than MAX_SNAPSHOT_TABLE_BYTES. ``name``
    is the image file's. Raises `CorruptImage`.
    """
    snapshots, at = [], 0
    for index in range(header.nb_snapshots):
        fields_end = at + ENTRY.size
        place = f"{name}: snapshot table entry {index} at {header.snapshots_offset + at:#x}"
        if fields_end > len(data):
            raise CorruptImage(f"{place}: the table is cut short")
        (
            l1_table_offset,
            l1_size,
            id_size,
            name_size,
            date_sec,
            date_nsec,
            vm_clock,
            vm_state_size,
            extra_data_size,
        ) = ENTRY.unpack_from(data, at)
        if extra_data_size > MAX_SNAPSHOT_EXTRA:
            raise CorruptImage(
                f"{place}: extra_data_size is {extra_data_size}; "
                f"{MAX_SNAPSHOT_EXTRA} at most is allowed"
            )
        extra_end = fields_end + extra_data_size
        id_end = extra_end + id_size
        name_end = id_end + name_size
        if name_end > MAX_SNAPSHOT_TABLE_BYTES:
            raise CorruptImage(f"{place}: the table exceeds {MAX_SNAPSHOT_TABLE_BYTES} bytes")
        if name_end > len(data):
            raise CorruptImage(f"{place}: the table is cut short")
        extra = bytes(data[fields_end:extra_end])
        # Fields that are not there read as zero below, and are not asked for then.
        long_size, disk_size, icount = EXTRA.unpack_from(extra.ljust(EXTRA.size, b"\0"))
        snapshots.append(
            Snapshot(
                id=data[extra_end:id_end].decode("utf-8", "surrogateescape"),
                name=data[id_end:name_end].decode("utf-8", "surrogateescape"),
                l1_table_offset=l1_table_offset,
                l1_size=l1_size,
                disk_size=disk_size if len(extra) >= 16 else header.virtual_size,
                vm_state_size=long_size if len(extra) >= 8 else vm_state_size,
                date=date_sec * _NANOSECONDS + date_nsec,
                vm_clock=vm_clock,
                icount=icount if len(extra) >= 24 and icount != 2**64 - 1 else None,
                extra=extra,
            )
        )
        at = -(-name_end // 8) * 8
    return snapshots


def build(snapshots: Sequence[Snapshot]) -> bytes:
    """The table of ``snapshots``, with the extra data that version 3 demands of each."""
    table = bytearray()
    for one in snapshots:
        extra = one.extra
        if len(extra) < EXTRA_V3:
            known = {"vm_state_size": one.vm_state_size, "disk_size": one.disk_size, "icount": 0}
            extra = SNAPSHOT_EXTRA.build(known)[:EXTRA_V3]
        identity, name = to_bytes(one.id), to_bytes(one.name)
        # A damaged table may have nanoseconds that are more than a second's.
        date_sec = min(one.date // _NANOSECONDS, _MAX_DATE_SEC)
        fields = {
            "l1_table_offset": one.l1_table_offset,
            "l1_size": one.l1_size,
            "id_size": len(identity),
            "name_size": len(name),
            "date_sec": date_sec,
            "date_nsec": one.date - date_sec * _NANOSECONDS,
            "vm_clock_nsec": one.vm_clock,
            # What does not fit is in the extra data alone: then it is none for who reads only this.
            "vm_state_size": one.vm_state_size if one.vm_state_size < 1 << 32 else 0,
            "extra_data_size": len(extra),
        }
        table += SNAPSHOT_ENTRY.build(fields) + extra + identity + name
        table += bytes(-len(table) % 8)
    return bytes(table)


def table_length(snapshots: Sequence[Snapshot]) -> int:
    """Bytes of the snapshot table."""
    lengths = (
        ENTRY.size + len(one.extra) + len(to_bytes(one.id)) + len(to_bytes(one.name))
        for one in snapshots
    )
    return sum(-(-length // 8) * 8 for length in lengths)


def find(snapshots: Sequence[Snapshot], wanted: str) -> Snapshot | None:
    """The snapshot that qemu-nbd's --load-snapshot would mean by ``wanted``; None if there is none.

    Either "snapshot.id=ID" and "snapshot.name=NAME", one of them or both with a comma between; or
    an ID or, where no ID is like it, a name. Raises `UsageError` for another key.
    """
    if not wanted.startswith("snapshot."):
        by_id = (snapshot for snapshot in snapshots if snapshot.id == wanted)
        by_name = (snapshot for snapshot in snapshots if snapshot.name == wanted)
        return next(by_id, None) or next(by_name, None)
    # A comma within a value is written twice.
    options = [part.replace("\0", ",") for part in wanted.replace(",,", "\0").split(",")]
    keys = dict(option.partition("=")[::2] for option in options)
    unknown = keys.keys() - {"snapshot.id", "snapshot.name"}
    if unknown:
        raise UsageError(
            f"{', '.join(map(repr, sorted(unknown)))}:"
            " choose by snapshot.id=ID or snapshot.name=NAME"
        )
    for snapshot in snapshots:
        if (
            keys.get("snapshot.id", snapshot.id) == snapshot.id
            and keys.get("snapshot.name", snapshot.name) == snapshot.name
        ):
            return snapshot
    return None
