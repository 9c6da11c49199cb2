"""Metadata contexts: the queries that select them, and the payload that filters them (the data of
NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT, and NBD_CMD_BLOCK_STATUS, of the NBD
specification).

The first byte of an input chooses: a payload, with as many contexts negotiated as the second byte
says, or the data of an option.

Allowed: `RequestError` NBD_EINVAL for a payload, `OptionError` NBD_REP_ERR_INVALID for an option.
What comes out is what a second reading of the same bytes says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pynbd.errors import OptionError, RequestError
from pynbd.protocol.metadata import (
    decode_filter,
    encode_filter,
    list_contexts,
    longest_filter,
    select_contexts,
)
from pynbd.protocol.wire import MetaContextData
from tests.conformance.client import Errno, Rep, filter_payload, meta_data

ALLOWED = (OptionError, RequestError)
MAX_LEN = 2048
DICTIONARY = (b"base:", b"qemu:", b"base:allocation", b"qemu:dirty-bitmap:", b"\0\0\0\1")
_NAMES = (
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:",
    "qemu:dirty-bitmap:b:",
    "qemu:dirty-bitmap:\udcff",
)


def seeds() -> Iterable[bytes]:
    yield b"\0\3" + filter_payload(1 << 20, [0, 2])
    yield b"\0\3" + filter_payload(2**64 - 1, [2, 1, 0])
    yield b"\0\1" + filter_payload(1, [])
    yield b"\0\2" + filter_payload(0, [1])
    yield b"\0\2" + filter_payload(1, [1, 1])
    yield b"\1" + meta_data("", [])
    yield b"\1" + meta_data("disk", ["base:", "qemu:dirty-bitmap:", "qemu:allocation-depth"])
    yield b"\1" + meta_data("disk", ["base:allocation", b"qemu:dirty-bitmap:\xff", "x:", ":", ""])


def one_input(data: bytes) -> None:
    if data[:1] in (b"", b"\0"):
        _filter(data[2:], range(data[1] if len(data) > 1 else 0))
    else:
        _option(data[1:])


def _filter(payload: bytes, negotiated: range) -> None:
    numbers = struct.unpack(f">{len(payload) // 4}I", payload[: len(payload) // 4 * 4])
    ids = numbers[2:]
    valid = (
        len(payload) % 4 == 0
        and len(numbers) > 2
        and any(numbers[:2])
        and len(set(ids)) == len(ids)
        and all(id_ in negotiated for id_ in ids)
    )
    try:
        length, chosen = decode_filter(memoryview(payload), negotiated)
    except RequestError as error:
        assert (error.error, valid) == (Errno.EINVAL, False)  # noqa: PT017 (it goes on)
        raise
    assert valid
    assert len(payload) <= longest_filter(negotiated)
    assert (length, chosen) == (numbers[0] << 32 | numbers[1], ids)
    assert encode_filter(length, chosen) == payload


def _option(data: bytes) -> None:
    try:
        asked = MetaContextData.parse(data)
    except OptionError as error:
        assert error.reply == Rep.ERR_INVALID  # noqa: PT017 (it goes on)
        raise
    assert asked.build() == data
    queries = [query.encode("utf-8", "surrogateescape") for query in asked.queries]
    selected, listed = [], []
    for number, name in enumerate(_NAMES):
        raw = name.encode("utf-8", "surrogateescape")
        namespace = raw[: raw.index(b":") + 1]
        if raw in queries:
            selected.append((number, name))
        wildcards = {namespace} | ({b"qemu:dirty-bitmap:"} & {raw[:18]})
        if not queries or raw in queries or wildcards.intersection(queries):
            listed.append(name)
    assert list(select_contexts(_NAMES, asked.queries).items()) == selected
    assert list_contexts(_NAMES, asked.queries) == listed
