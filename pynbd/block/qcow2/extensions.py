"""Header extensions (pure).

docs/interop/qcow2.rst, "Header extensions" to "Bitmaps extension". Each known one appears at most
once, fits into what is left of the first cluster, and obeys its own rules; others are kept as they
are. Errors are `CorruptImage`; it is `header` that adds the file's name to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from construct import StreamError

from pynbd.block.qcow2.format import (
    BITMAPS_EXTENSION,
    EXTENSION,
    FEATURE_NAME,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_OFFSET,
    ExtensionType,
)
from pynbd.errors import CorruptImage


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory is: its offset and size in bytes, and its number of entries."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class Extension:
    """A header extension as stored: its type and its data without padding."""

    type: int
    data: bytes


def read_extensions(data: bytes, offset: int, end: int) -> tuple[dict[int, bytes], list[Extension]]:
    """The extensions between ``offset`` and ``end``: known ones by type, the others in order."""
    known: dict[int, bytes] = {}
    others: list[Extension] = []
    while offset + EXTENSION.sizeof() <= end:
        head = EXTENSION.parse(data[offset:])
        if head.type == ExtensionType.END:
            break
        offset += EXTENSION.sizeof()
        check(
            head.length <= end - offset,
            f"the header extension {head.type:#010x} at {offset - 8:#x} is {head.length} bytes "
            f"long; there is room for {end - offset}",
        )
        body = cut(data, offset, head.length)
        if head.type in list(ExtensionType):
            check(
                head.type not in known,
                f"the header extension {head.type:#010x} appears more than once",
            )
            known[head.type] = body
        else:
            others.append(Extension(head.type, body))
        offset += -(-head.length // 8) * 8
    return known, others


def read_feature_names(table: bytes) -> dict[tuple[int, int], str]:
    size = FEATURE_NAME.sizeof()
    whole = len(table) - len(table) % size
    entries = (FEATURE_NAME.parse(table[at : at + size]) for at in range(0, whole, size))
    return {(entry.type, entry.bit): to_text(entry.name.split(b"\0")[0]) for entry in entries}


def read_bitmaps(data: bytes, cluster_size: int) -> BitmapsExtension:
    size = BITMAPS_EXTENSION.sizeof()
    check(len(data) == size, f"the bitmaps extension is {len(data)} bytes long, not {size}")
    fields = BITMAPS_EXTENSION.parse(data)
    check(fields.reserved == 0, "the reserved field of the bitmaps extension is not 0")
    check(
        1 <= fields.nb_bitmaps <= MAX_BITMAPS,
        f"nb_bitmaps is {fields.nb_bitmaps}; 1 to {MAX_BITMAPS} are allowed",
    )
    check(
        fields.bitmap_directory_size <= MAX_BITMAP_DIRECTORY_BYTES,
        f"bitmap_directory_size is {fields.bitmap_directory_size}; "
        f"{MAX_BITMAP_DIRECTORY_BYTES} at most are allowed",
    )
    check_place(
        "bitmap_directory_offset",
        fields.bitmap_directory_offset,
        fields.bitmap_directory_size,
        cluster_size,
    )
    return BitmapsExtension(
        fields.nb_bitmaps, fields.bitmap_directory_size, fields.bitmap_directory_offset
    )


def build_extension(extension_type: int, data: bytes) -> bytes:
    """An extension as it is stored: type, length, data, padding."""
    head: bytes = EXTENSION.build({"type": extension_type, "length": len(data)})
    return head + data + bytes(-len(data) % 8)


def build_feature_names(names: Mapping[tuple[int, int], str]) -> bytes:
    entries = (
        FEATURE_NAME.build({"type": kind, "bit": bit, "name": to_bytes(name).ljust(46, b"\0")})
        for (kind, bit), name in names.items()
    )
    return build_extension(ExtensionType.FEATURE_NAME_TABLE, b"".join(entries))


def build_bitmaps(bitmaps: BitmapsExtension) -> bytes:
    fields = {
        "nb_bitmaps": bitmaps.nb_bitmaps,
        "reserved": 0,
        "bitmap_directory_size": bitmaps.directory_size,
        "bitmap_directory_offset": bitmaps.directory_offset,
    }
    return build_extension(ExtensionType.BITMAPS, BITMAPS_EXTENSION.build(fields))


def check_place(field_name: str, offset: int, length: int, cluster_size: int) -> None:
    check(
        offset % cluster_size == 0,
        f"{field_name} is {offset:#x}; multiples of the cluster size {cluster_size} are allowed",
    )
    check(
        offset + length <= MAX_OFFSET,
        f"{field_name} is {offset:#x}; with {length} bytes it would end beyond 2^63 - 1",
    )


def check(allowed: bool, otherwise: str) -> None:
    if not allowed:
        raise CorruptImage(otherwise)


def cut(data: bytes, offset: int, length: int) -> bytes:
    """Like a slice, but raises `StreamError` if it is cut short, as construct does for fields."""
    piece = data[offset : offset + length]
    if len(piece) < length:
        raise StreamError
    return piece


def to_text(raw: bytes) -> str:
    """A name from the image. Bytes that are not UTF-8 survive the way there and back."""
    return raw.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
