"""Boundary values of a field, and where the structures of an image are."""

from __future__ import annotations

from collections.abc import Iterator

from interop.damage.fields import Field, Kind
from interop.damage.images import NAME, Sound
from interop.damages import FIRST, OFFSET, PACKED, Target

Changes = tuple[tuple[int, bytes], ...]

# Names that lead elsewhere, or nowhere, or are none.
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a NUL": b"\0",
    "NUL within": b"a\0b",
    "the image itself": NAME.encode(),
    "the image by another name": b"./" + NAME.encode(),
    "this folder": b".",
    "the root": b"/",
    "the folder above": b"..",
    "nowhere": b"nowhere",
    "a path through a file": NAME.encode() + b"/x",
    "a file elsewhere": b"/etc/passwd",
    "by way of the folder above": b"../../../../../../../etc/passwd",
    "a device of zeroes": b"/dev/zero",
    "a device of nothing": b"/dev/null",
    "a terminal": b"/dev/tty",
    "standard input": b"/dev/stdin",
    "memory of the process": b"/proc/self/mem",
    "a protocol": b"nbd://localhost",
    "a socket": b"nbd:unix:/tmp/s",
    "another machine": b"http://localhost/x",
    "a folder as a disk": b"fat:rw:/etc",
    "JSON": b'json:{"driver":"file","filename":"/etc/passwd"}',
    "JSON that ends": b"json:{",
    "signs that steer a terminal": b"\x1b[2J\r\n\x07",
    "not UTF-8": b"\xff\xfe\xc3\x28",
    "half a surrogate": b"\xed\xa0\x80",
    "places of a format": b"%s%n{0}{name}",
    "the format qcow2": b"qcow2",
    "the format raw": b"raw",
    "the format vmdk": b"vmdk",
    "a long one": b"x" * 300,
    "the longest": b"y" * 1023,
    "a deep one": b"/" * 1023,
    "too long": b"z" * 1024,
}


def metadata(target: Target) -> dict[str, int]:
    """Where structures begin, by name."""
    header = target.written.header
    found = {
        "the header": 0,
        "the L1 table": target.l1(),
        "an L2 table": target.word(target.l1()) & OFFSET,
        "the refcount table": target.table,
        "a refcount block": target.block,
    }
    if header.nb_snapshots:
        found |= {
            "the snapshot table": target.snapshot,
            "a snapshot's L1 table": target.snapshot_l1(),
            "a snapshot's L2 table": target.snapshot_l2(),
        }
    if header.bitmaps is not None:
        found |= {
            "the bitmap directory": target.bitmaps,
            "a bitmap table": target.word(target.bitmaps),
        }
    return found


def places(target: Target) -> dict[str, int]:
    """`metadata`, and where data are."""
    found = metadata(target)
    if not target.written.header.has_data_file:
        found["data"] = target.host(FIRST)
        found["compressed data"] = target.word(target.l2(PACKED)) & (1 << 48) - 1
    found["the last cluster"] = (target.end - 1) // target.cluster * target.cluster
    return {name: at for name, at in found.items() if at < target.end}


def boundaries(field: Field, of: Sound) -> Iterator[tuple[str, Changes]]:
    """(how it is called, what is to be written) of each value."""
    if field.kind is Kind.TEXT:
        yield from _texts(field)
        return
    for name, value in _numbers(field, of).items():
        yield name, _put(field, of, value)


def single_bits(field: Field, of: Sound) -> Iterator[tuple[str, Changes]]:
    """Each bit of the field the other way round."""
    now = _now(field, of)
    for bit in range(field.bits):
        yield f"bit {bit}", _put(field, of, now ^ 1 << bit)


def _texts(field: Field) -> Iterator[tuple[str, Changes]]:
    for name, text in TEXTS.items():
        if field.length_at is None:
            yield name, ((field.offset, text[: field.room].ljust(field.room, b"\0")),)
        elif len(text) <= field.room:
            # What is left of the old name is overwritten; behind an extension the next one begins.
            filled = text.ljust(-(-max(len(text), field.length) // 8) * 8, b"\0")
            length = len(text).to_bytes(4, "big")
            yield name, ((field.offset, filled), (field.length_at, length))


def _numbers(field: Field, of: Sound) -> dict[str, int]:
    bits, now = field.bits, _now(field, of)
    top = (1 << bits) - 1
    found = {"0": 0, "1": 1, "2": 2, "3": 3, "7": 7, "8": 8, "511": 511, "512": 512}
    found |= {f"2^{n}": 1 << n for n in (9, 14, 16, 17, 20, 21, 22, 24, 25, 30) if n < bits - 2}
    found |= {
        f"2^{bits} - 1": top,
        f"2^{bits} - 2": top - 1,
        f"2^{bits - 1}": 1 << bits - 1,
        f"2^{bits - 1} - 1": (1 << bits - 1) - 1,
        f"2^{bits - 1} + 1": (1 << bits - 1) + 1,
        "one more": now + 1,
        "one less": now - 1,
        "twice": now * 2,
        "half": now // 2,
    }
    if bits == 64:
        found |= _offsets(field, of, now)
    return {name: value for name, value in found.items() if 0 <= value <= top}


def _offsets(field: Field, of: Sound, now: int) -> dict[str, int]:
    target, size = of.target, of.target.cluster
    found = {
        "a byte further": now + 1,
        "8 bytes further": now + 8,
        "a sector further": now + 512,
        "a cluster further": now + size,
        "a cluster less": now - size,
        "2^63 - a cluster": (1 << 63) - size,
        "2^64 - a cluster": (1 << 64) - size,
        "2^62": 1 << 62,
        "2^61": 1 << 61,
    }
    to = {
        **places(target),
        "itself": field.offset // size * size,
        "the end of the file": target.end,
        "past the end of the file": target.end + size,
        "the end but for 8 bytes": max(target.end - 8, 0),
        "2^40": 1 << 40,
        "2^54": 1 << 54,
        "2^56 - a cluster": (1 << 56) - size,
    }
    found |= to
    if field.kind is Kind.ENTRY:
        # With the flags that are there, and with each of those that there are.
        flags = now & ~OFFSET
        for name, at in to.items():
            found[f"{name}, its flags kept"] = flags | at
            found[f"{name}, copied"] = 1 << 63 | at
            found[f"{name}, compressed"] = 1 << 62 | at
            found[f"{name}, zero"] = 1 | at
    return found


def _now(field: Field, of: Sound) -> int:
    data = of.content[field.offset : field.offset + field.length].ljust(field.length, b"\0")
    word = int.from_bytes(data, "big")
    return word >> field.shift & (1 << field.bits) - 1


def _put(field: Field, of: Sound, value: int) -> Changes:
    if field.bits < 8:
        (byte,) = of.content[field.offset : field.offset + 1]
        mask = (1 << field.bits) - 1 << field.shift
        value = byte & ~mask | value << field.shift
    return ((field.offset, value.to_bytes(field.length, "big")),)
