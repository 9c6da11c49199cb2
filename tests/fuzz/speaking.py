"""What a server says, in the layouts of the NBD specification; what a client says is built by
`tests.conformance.client`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.conformance.client import (
    EXTENDED_REPLY_MAGIC,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Mode,
)


def option_reply(code: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, code, kind, len(data)) + data


def simple_reply(cookie: int, *, error: int = 0) -> bytes:
    return struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(
    mode: Mode, flags: int, kind: int, cookie: int, payload: bytes = b"", *, offset: int = 0
) -> bytes:
    """``offset``: that of the request, which an extended header repeats."""
    length = len(payload)
    if mode is Mode.EXTENDED:
        fields = (EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
        return struct.pack(">IHHQQQ", *fields) + payload
    return struct.pack(">IHHQI", STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length) + payload


def error_payload(error: int, text: str, *, at: int | None = None) -> bytes:
    """``at``: the offset of NBD_REPLY_TYPE_ERROR_OFFSET."""
    payload = struct.pack(">IH", error, len(text.encode())) + text.encode()
    return payload if at is None else payload + struct.pack(">Q", at)


def status(
    mode: Mode,
    flags: int,
    cookie: int,
    context: int,
    extents: Sequence[tuple[int, int]],
    *,
    offset: int = 0,
) -> bytes:
    """A chunk of descriptors."""
    if mode is Mode.EXTENDED:
        kind, payload, pair = (
            Chunk.BLOCK_STATUS_EXT,
            struct.pack(">II", context, len(extents)),
            ">QQ",
        )
    else:
        kind, payload, pair = Chunk.BLOCK_STATUS, struct.pack(">I", context), ">II"
    payload += b"".join(struct.pack(pair, *extent) for extent in extents)
    return chunk(mode, flags, kind, cookie, payload, offset=offset)
