"""Malformed client flags and options: rows H, O, S and M.

Not all of them are refused: the rows O7, M18 and M19 are to be overlooked.
"""

from __future__ import annotations

import struct

from tests.conformance.client import Option, client_flags, info_data, meta_data, option
from tests.conformance.malformed import Stimulus

MIB = 1 << 20
_FLAGS = client_flags()
_STRUCTURED = _FLAGS + option(Option.STRUCTURED_REPLY)
_EXTENDED = _FLAGS + option(Option.EXTENDED_HEADERS)


def _u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _flags() -> list[Stimulus]:
    after = option(Option.LIST)
    return [
        Stimulus("H5", "flags 0, then LIST", b"", client_flags(0) + after),
        Stimulus("H5", "flags 2, then GO", b"", client_flags(2) + option(7, info_data(""))),
        Stimulus("H6", "client flag bit 2", b"", client_flags(1 << 2 | 3) + after),
        Stimulus("H6", "client flag bit 31", b"", client_flags(1 << 31 | 3) + after),
        Stimulus("H6", "all client flags", b"", client_flags(0xFFFFFFFF) + after),
    ]


def _framing() -> list[Stimulus]:
    rows = [
        Stimulus("H12", "wrong option magic", _FLAGS, option(Option.LIST, magic=b"IHAVEOPS")),
        Stimulus("H12", "zeroes", _FLAGS, bytes(64)),
        Stimulus("H12", "a second greeting", _FLAGS, b"NBDMAGICIHAVEOPT\0\3"),
    ]
    for code in (99, Option.EXPORT_NAME, Option.LIST, Option.GO, Option.SET_META_CONTEXT):
        for length in (32 * MIB + 1, 0xFFFFFFFF):
            name = f"option {code} of {length} bytes"
            rows.append(Stimulus("H13", name, _FLAGS, option(code, bytes(32), length=length)))
    rows.append(Stimulus("H14", "unknown, 32 MiB", _FLAGS, option(99, bytes(32 * MIB))))
    return rows


def _exports() -> list[Stimulus]:
    name = Option.EXPORT_NAME
    rows = [
        Stimulus("O2", "4097 bytes", _FLAGS, option(name, b"n" * 4097)),
        Stimulus("O3", "a NUL after a good name", _FLAGS, option(name, b"raw\0x")),
        Stimulus("O4", "EXPORT_NAME", _EXTENDED, option(name, b"raw")),
        Stimulus("O7", "ABORT with data", _FLAGS, option(Option.ABORT, b"data")),
        Stimulus("O7", "ABORT with 1 MiB", _FLAGS, option(Option.ABORT, bytes(MIB))),
        Stimulus("O10", "LIST with data", _FLAGS, option(Option.LIST, b"data")),
        Stimulus("O10", "LIST with 1 MiB", _FLAGS, option(Option.LIST, bytes(MIB))),
    ]
    for code in (Option.INFO, Option.GO):
        for row, what, data in [
            ("O14", "no data", b""),
            ("O14", "1 byte", b"\0"),
            ("O14", "4 bytes", _u32(0)),
            ("O14", "5 bytes", _u32(0) + b"\0"),
            ("O15", "the name is 1 byte too long", _u32(3) + b"ra" + b"\0\0"),
            ("O15", "the name leaves no room for the count", _u32(3) + b"raw"),
            ("O16", "name length 2^32 - 1", _u32(0xFFFFFFFF) + b"raw\0\0"),
            ("O16", "name length 2^31", _u32(1 << 31) + b"raw\0\0"),
            ("O17", "a name of 4097 bytes", info_data("n" * 4097)),
            ("O20", "a NUL in the name", info_data("raw\0")),
            ("O20", "a NUL for a name", info_data("\0")),
            ("O21", "not UTF-8", info_data(b"\xff\xfe")),
            ("O21", "UTF-8 cut short", info_data("größe".encode()[:3])),
            ("O21", "a surrogate", info_data(b"\xed\xa0\x80")),
            ("O22", "one request, and none there", info_data("raw")[:-2] + b"\0\1"),
            ("O22", "65535 requests, one there", info_data("raw", [3])[:-4] + b"\xff\xff\0\3"),
            ("O23", "one byte too many", info_data("raw") + b"\0"),
            ("O23", "a request that was not counted", info_data("raw", [3]) + b"\0\1"),
            ("O23", "1 MiB too many", info_data("raw") + bytes(MIB)),
        ]:
            rows.append(Stimulus(row, f"{code.name}, {what}", _FLAGS, option(code, data)))
    return rows


def _headers() -> list[Stimulus]:
    structured, extended = Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS
    return [
        Stimulus("S2", "structured twice", _STRUCTURED, option(structured)),
        Stimulus("S3", "structured with data", _FLAGS, option(structured, b"data")),
        Stimulus("S6", "extended twice", _EXTENDED, option(extended)),
        Stimulus("S7", "extended with data", _FLAGS, option(extended, b"data")),
        Stimulus("S8", "structured after extended", _EXTENDED, option(structured)),
    ]


def _contexts() -> list[Stimulus]:
    base = "base:allocation"
    good = meta_data("raw", [base])
    rows = [
        Stimulus("M2", "SET", _FLAGS, option(Option.SET_META_CONTEXT, good)),
        Stimulus("M2", "SET, no queries", _FLAGS, option(10, meta_data("raw"))),
    ]
    for code in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        for row, what, data in [
            ("M18", "a query without a colon", meta_data("raw", ["base"])),
            ("M18", "an empty query", meta_data("raw", ["", base])),
            ("M19", "a query of 4097 bytes", meta_data("raw", ["q" * 4097, base])),
            ("M20", "a NUL in a query", meta_data("raw", ["base:\0allocation"])),
            ("M20", "a NUL after a good query", meta_data("raw", [base, base + "\0"])),
            ("M20", "a NUL in the name", meta_data("raw\0", [base])),
            ("M21", "two queries, one there", meta_data("raw", [base]).replace(b"\1", b"\2", 1)),
            ("M21", "2^32 - 1 queries", meta_data("raw")[:-4] + _u32(0xFFFFFFFF)),
            ("M21", "a query 1 byte too long", good[:-1]),
            ("M21", "a query of 2^32 - 1 bytes", meta_data("raw")[:-4] + _u32(1, 0xFFFFFFFF)),
            ("M21", "no room for a query's length", meta_data("raw")[:-4] + _u32(1) + b"\0\0"),
            ("M21", "the name is longer than the data", _u32(20) + b"raw" + _u32(0)),
            ("M22", "no data", b""),
            ("M22", "3 bytes", bytes(3)),
            ("M22", "4 bytes", bytes(4)),
            ("M22", "7 bytes", bytes(7)),
            ("M23", "a byte too many", good + b"\0"),
            ("M23", "an option too many", good + option(Option.ABORT)),
            ("M23", "an option too many, no queries", meta_data("raw") + option(Option.ABORT)),
            ("M31", "too many queries", meta_data("raw", [base] * (MIB // 8))),
        ]:
            setup = _FLAGS if row == "M23" and code == Option.LIST_META_CONTEXT else _STRUCTURED
            rows.append(Stimulus(row, f"{code.name}, {what}", setup, option(code, data)))
    empty = _u32(0, 8 * MIB - 2) + bytes(32 * MIB - 8)
    rows.append(Stimulus("M31", "32 MiB of empty queries", _STRUCTURED, option(10, empty)))
    return rows


STIMULI = [*_flags(), *_framing(), *_exports(), *_headers(), *_contexts()]
