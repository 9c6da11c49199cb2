"""Metadata contexts: their names, the queries that select them, the payload that filters them.

"Metadata querying", NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT and
NBD_CMD_BLOCK_STATUS in the NBD specification; the namespace ``qemu:`` is that of QEMU's
``docs/interop/nbd.txt``.

1. A name is compared exactly, byte by byte: `str` with ``surrogateescape`` stands for the bytes.
2. The id of a context is its place among the contexts of its export, whatever was selected.
3. An empty leaf-name is a wildcard when contexts are listed and selects nothing when they are set.
4. What is not known is ignored: it may belong to a later version of a namespace.
"""

import struct
from collections.abc import Collection, Sequence
from typing import Final

from pynbd.errors import RequestError
from pynbd.protocol.values import Error

BASE_ALLOCATION: Final = "base:allocation"
QEMU_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""The name of a bitmap follows."""

_EFFECT_LENGTH: Final = 8
_ID: Final = 4


def list_contexts(contexts: Sequence[str], queries: Sequence[str]) -> list[str]:
    """Return those of an export's contexts that match a query, all of them without queries."""
    if not queries:
        return list(contexts)
    wanted = set(queries)
    prefixes = tuple(filter(_is_wildcard, wanted))
    return [name for name in contexts if name in wanted or name.startswith(prefixes)]


def _is_wildcard(query: str) -> bool:
    """Whether a query is a namespace with an empty leaf-name."""
    return query == QEMU_DIRTY_BITMAP or (query.endswith(":") and query.count(":") == 1)


def select_contexts(contexts: Sequence[str], queries: Sequence[str]) -> dict[int, str]:
    """Return those of an export's contexts that a query names, by their ids, in their order."""
    wanted = set(queries)
    return {id_: name for id_, name in enumerate(contexts) if name in wanted}


def longest_filter(negotiated: Collection[int]) -> int:
    """Return the bytes of the longest payload that can be valid; a longer one need not be read."""
    return _EFFECT_LENGTH + _ID * len(negotiated)


def decode_filter(
    payload: bytes | bytearray | memoryview, negotiated: Collection[int]
) -> tuple[int, tuple[int, ...]]:
    """Parse the payload of NBD_CMD_BLOCK_STATUS.

    Return the effect length (bytes, 1 to 2**64 - 1, not yet held against the export's size) and
    the ids of the contexts to answer, at least one, all different and all in ``negotiated``.
    RequestError is NBD_EINVAL for anything else.
    """
    count, rest = divmod(len(payload) - _EFFECT_LENGTH, _ID)
    if count < 0 or rest:
        raise _invalid(f"a payload of {len(payload)} bytes, not of 8 + n*4")
    if count == 0:
        raise _invalid("the payload names no metadata context")
    if count > len(negotiated):
        raise _invalid("the payload names more metadata contexts than were negotiated")
    length, *ids = struct.unpack(f">Q{count}I", payload)
    if length == 0:
        raise _invalid("the effect length in the payload is 0")
    if len(set(ids)) != count:
        raise _invalid("the payload names a metadata context twice")
    for id_ in ids:
        if id_ not in negotiated:
            raise _invalid(f"metadata context {id_} was not negotiated")
    return length, tuple(ids)


def encode_filter(length: int, ids: Sequence[int]) -> bytes:
    """Return the payload of NBD_CMD_BLOCK_STATUS for an effect length (bytes) and context ids."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def _invalid(reason: str) -> RequestError:
    return RequestError(Error.EINVAL, reason)
