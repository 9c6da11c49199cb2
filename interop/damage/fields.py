"""Where every field of every structure of a sound image is (docs/interop/qcow2.rst of QEMU).

The places come from the sound bytes, and the layouts are those that `pynbd.block.qcow2.format`
declares: what is expected of a reader does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from construct import Struct

from interop.damage.images import IMAGES, Sound
from interop.damages import EMPTY, FIRST, KEPT, OTHER_TABLE, PACKED, PIECES, Target
from pynbd.block.qcow2.format import (
    BITMAP_DIRECTORY_ENTRY,
    BITMAPS_EXTENSION,
    EXTENSION,
    HEADER_LENGTH_V3,
    HEADER_V2,
    HEADER_V3_FIELDS,
    SNAPSHOT_ENTRY,
    SNAPSHOT_EXTRA,
    ExtensionType,
)

_UNUSED = 10  # a guest cluster that is in no image, beside others in an L2 table
_OFFSET = 0x00FFFFFFFFFFFE00
_BEHIND_NAME = 1024  # of a backing file: nothing else is in the header's cluster
# Structures that say nothing of the active layer's content.
_NOT_OF_THE_GUEST = ("refcount", "snapshot", "bitmap", "feature names", "extension unknown")


class Kind(Enum):
    """What a field holds, which decides about its boundary values."""

    NUMBER = "number"
    ENTRY = "entry"  # a host offset and flags
    REFCOUNT = "refcount"
    TEXT = "text"


@dataclass(frozen=True)
class Field:
    """A field of ``bits`` bits, the lowest of which is bit ``shift`` of the byte at ``offset`` if
    they are less than eight.

    ``length_at``: the field, of 4 bytes, that has a text's length, and ``room`` its most.
    ``harms``: the range of the guest that damage may concern, None: all, or the whole image.
    """

    structure: str
    name: str
    offset: int
    bits: int
    kind: Kind = Kind.NUMBER
    shift: int = 0
    room: int = 0
    length_at: int | None = None
    harms: range | None = None

    @property
    def length(self) -> int:
        return -(-self.bits // 8)


def fields(sound: Sound) -> list[Field]:
    """Those of an image, in the order of its structures."""
    nothing = range(0)
    return [
        replace(field, harms=nothing) if field.structure.startswith(_NOT_OF_THE_GUEST) else field
        for field in _fields(sound)
    ]


def _fields(sound: Sound) -> Iterator[Field]:
    header = sound.target.written.header
    yield from declared(HEADER_V2, f"header v{header.version}", 0)
    if header.version >= 3:
        yield from declared(HEADER_V3_FIELDS, "header v3", HEADER_V2.sizeof())
    if header.header_length > HEADER_LENGTH_V3:
        yield Field("header v3", "compression_type", HEADER_LENGTH_V3, 8)
    yield from _extensions(sound)
    yield from _tables(sound)
    yield from _refcounts(sound.target)
    yield from _snapshots(sound)
    yield from _bitmaps(sound)


def declared(struct: Struct, structure: str, offset: int, of: str = "") -> Iterator[Field]:
    """The fields of a declared structure."""
    for field in struct.subcons:
        yield Field(structure, field.name + of, offset, field.sizeof() * 8)
        offset += field.sizeof()


def number(sound: Sound, offset: int, length: int) -> int:
    return int.from_bytes(sound.content[offset : offset + length], "big")


def _extensions(sound: Sound) -> Iterator[Field]:
    header = sound.target.written.header
    version_3 = header.version >= 3
    at = number(sound, 100, 4) if version_3 else HEADER_V2.sizeof()
    while True:
        kind, length = number(sound, at, 4), number(sound, at + 4, 4)
        yield from declared(EXTENSION, f"extension {_called(kind)}", at)
        if kind == ExtensionType.END:
            break
        data, room = at + EXTENSION.sizeof(), -(-length // 8) * 8
        if kind in (ExtensionType.BACKING_FORMAT, ExtensionType.DATA_FILE):
            field = "format" if kind == ExtensionType.BACKING_FORMAT else "data file"
            alone = kind == ExtensionType.DATA_FILE and header.backing_file is None
            longest = _BEHIND_NAME if alone else room
            yield Field("names", field, data, length * 8, Kind.TEXT, 0, longest, at + 4)
        elif kind == ExtensionType.FEATURE_NAME_TABLE:
            yield Field("feature names", "type", data, 8)
            yield Field("feature names", "bit", data + 1, 8)
            yield Field("feature names", "name", data + 2, 46 * 8, Kind.TEXT, 0, 46)
        elif kind == ExtensionType.BITMAPS:
            yield from declared(BITMAPS_EXTENSION, "bitmaps extension", data)
        at = data + room
    if header.backing_file is not None:
        name = number(sound, 8, 8)
        length = number(sound, 16, 4)
        yield Field("names", "backing file", name, length * 8, Kind.TEXT, 0, _BEHIND_NAME, 16)


def _called(kind: int) -> str:
    known = kind in list(ExtensionType)
    return ExtensionType(kind).name.lower().replace("_", " ") if known else "unknown"


def _tables(sound: Sound) -> Iterator[Field]:
    target = sound.target
    header = target.written.header
    size = header.cluster_size
    in_table = header.layout.l2_entries
    clusters = IMAGES[sound.name].clusters
    for name, index in ("first", 0), ("last", header.l1_size - 1):
        harms = range(index * in_table * size, (index + 1) * in_table * size)
        yield Field("L1", name, target.l1(index), 64, Kind.ENTRY, harms=harms)
    structure = "L2 extended" if header.extended_l2 else "L2 standard"
    called = {
        FIRST: "data",
        EMPTY: "zero",
        KEPT: "preallocated",
        PIECES: "subclusters",
        OTHER_TABLE: "other table",
    }
    there = {at // size for at in clusters}
    places = {name: at for at, name in called.items() if at in there}
    for name, cluster in (places | {"unused": _UNUSED, "last of its table": in_table - 1}).items():
        at, harms = target.l2(cluster), range(cluster * size, (cluster + 1) * size)
        yield Field(structure, name, at, 64, Kind.ENTRY, harms=harms)
        if header.extended_l2:
            yield Field(structure, f"bitmap of {name}", at + 8, 64, harms=harms)
    if PACKED in there and not header.has_data_file:
        at, harms = target.l2(PACKED), range(PACKED * size, (PACKED + 1) * size)
        yield Field("compressed descriptor", "packed", at, 64, Kind.ENTRY, harms=harms)


def _refcounts(target: Target) -> Iterator[Field]:
    for name, at in ("first", target.table), ("second", target.table + 8):
        yield Field("refcount table", name, at, 64, Kind.ENTRY)
    bits = target.written.header.refcount_bits
    counted = {
        "header": 0,
        "L1 table": target.l1(),
        "L2 table": target.word(target.l1()) & _OFFSET,
        "refcount table": target.table,
        "refcount block": target.block,
        "past the end": target.end,
    }
    if not target.written.header.has_data_file:
        counted["data"] = target.host(FIRST)
    for name, cluster in counted.items():
        bit = cluster // target.cluster * bits
        at, shift = target.block + bit // 8, bit % 8
        yield Field(f"refcounts of {bits} bits", name, at, bits, Kind.REFCOUNT, shift)


def _snapshots(sound: Sound) -> Iterator[Field]:
    target = sound.target
    at = target.snapshot
    for index in range(target.written.header.nb_snapshots):
        structure = "snapshot table"
        yield from declared(SNAPSHOT_ENTRY, structure, at, f" of {index}")
        l1, identity, name = (
            number(sound, at, 8),
            number(sound, at + 12, 2),
            number(sound, at + 14, 2),
        )
        extra = number(sound, at + 36, 4)
        at += SNAPSHOT_ENTRY.sizeof()
        yield from declared(SNAPSHOT_EXTRA, "snapshot extra data", at, f" of {index}")
        at += extra
        yield Field(structure, f"ID of {index}", at, identity * 8, Kind.TEXT, 0, identity)
        yield Field(structure, f"name of {index}", at + identity, name * 8, Kind.TEXT, 0, name)
        at += -(-(identity + name) // 8) * 8
        yield Field("snapshot L1", f"first, by {index}", l1, 64, Kind.ENTRY)
        l2 = number(sound, l1, 8) & _OFFSET
        yield Field("snapshot L2", f"data, by {index}", l2, 64, Kind.ENTRY)


def _bitmaps(sound: Sound) -> Iterator[Field]:
    extension = sound.target.written.header.bitmaps
    if extension is None:
        return
    at = extension.directory_offset
    for index in range(extension.nb_bitmaps):
        yield from declared(BITMAP_DIRECTORY_ENTRY, "bitmap directory", at, f" of {index}")
        table, length = number(sound, at, 8), number(sound, at + 18, 2)
        name = at + BITMAP_DIRECTORY_ENTRY.sizeof()
        yield Field("bitmap directory", f"name of {index}", name, length * 8, Kind.TEXT, 0, length)
        yield Field("bitmap table", f"first of {index}", table, 64, Kind.ENTRY)
        at = name + -(-length // 8) * 8
