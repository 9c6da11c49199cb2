"""A message as it is told to people: its name in the specification, and what it carries.

"Option types", "Option reply types", "Structured reply types" and the payload of
NBD_CMD_BLOCK_STATUS in the NBD specification; what the states of a context mean for ``qemu:``
stands in QEMU's ``docs/interop/nbd.txt``.

1. What is malformed is told as such, in the field ``malformed``: nothing here raises.
2. Of a list, and of the descriptors of a chunk, the first `SHOWN` are told, and how many ``more``.
3. What a peer says is quoted and bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, IntFlag
from typing import Any, Final

from pynbd.errors import ProtocolError, PynbdError
from pynbd.protocol import wire
from pynbd.protocol.metadata import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP
from pynbd.protocol.values import (
    MAX_STRING,
    Error,
    Info,
    Option,
    OptionReply,
    ReplyType,
    TransmissionFlag,
)

SHOWN: Final = 4
"""Members of a list that are told."""

_ALLOCATION = ("data", "hole", "zero", "hole,zero")
_DIRTY = ("clean", "dirty")

Fields = dict[str, object]
Contexts = Mapping[int, str]


class Direction(Enum):
    """Who hears a message."""

    TO_SERVER = ">"
    TO_CLIENT = "<"

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


class Hexadecimal(int):
    """A number that is a name rather than an amount: a cookie, an id, a status of some context."""

    def __str__(self) -> str:
        return f"{int(self):#x}"


@dataclass(frozen=True, slots=True)
class Extent:
    """One descriptor of NBD_REPLY_TYPE_BLOCK_STATUS: ``length`` in bytes, ``state`` for people."""

    length: int
    state: str

    def __str__(self) -> str:
        return f"{self.length} {self.state}"


@dataclass(frozen=True, slots=True)
class Traced:
    """A message that has passed.

    ``message`` is its name in the specification. ``fields`` hold numbers, enumerations, texts of
    the peer, and tuples of them; what says nothing is left out.
    """

    direction: Direction
    message: str
    fields: Mapping[str, object]

    def __str__(self) -> str:
        fields = [f"{_label(name, value)}{_text(value)}" for name, value in self.fields.items()]
        return " ".join([self.direction.value, self.message, *fields])

    def record(self, connection: str) -> dict[str, object]:
        """What a program wants to know of it, as JSON has it: what has a name in the specification
        is a string.
        """
        fields = {name: _value(value) for name, value in self.fields.items()}
        return {
            "connection": connection,
            "direction": str(self.direction),
            "nbd": {"message": self.message, **fields},
        }


def _label(name: str, value: object) -> str:
    """Most flags say by their names what they are."""
    named = isinstance(value, IntFlag) and not isinstance(value, TransmissionFlag)
    return "" if named else f"{name} "


def _text(value: object) -> str:
    if isinstance(value, str):
        return wire.quote(value)
    if isinstance(value, tuple):
        return f"[{'; '.join(map(_text, value))}]"
    return str(value)


def _value(value: object) -> object:
    if isinstance(value, tuple):
        return [_value(member) for member in value]
    if isinstance(value, Extent):
        return asdict(value)
    if isinstance(value, str):  # bytes that are not UTF-8 have to show in it
        return value[:MAX_STRING].encode("utf-8", "backslashreplace").decode()
    return value if type(value) is int else str(value)


def first(name: str, members: Sequence[object], count: int | None = None) -> Fields:
    """The fields of a list of ``count`` members, of which the first are at hand."""
    more = (len(members) if count is None else count) - SHOWN
    return {name: tuple(members[:SHOWN])} | ({"more": more} if more > 0 else {})


def context_name(id_: int, contexts: Contexts) -> object:
    """The name of a metadata context, or its id if it was not negotiated."""
    return contexts.get(id_, Hexadecimal(id_))


def looked_into(parse: Callable[..., Fields], *args: Any) -> Fields:
    """What ``parse`` finds, or that it is malformed."""
    try:
        return parse(*args)
    except PynbdError as error:
        return {"malformed": str(error).partition(": ")[2]}
    except struct.error:
        return {"malformed": "it is shorter than its fields"}


# Options and their replies -----------------------------------------------------------------------


def _export_name(data: bytes) -> Fields:
    return {"name": wire.ExportNameData.parse(data).name}


def _info_data(data: bytes) -> Fields:
    info = wire.InfoData.parse(data)
    return {"name": info.name} | first("infos", [Info(request) for request in info.requests])


def _meta_context_data(data: bytes) -> Fields:
    asked = wire.MetaContextData.parse(data)
    return {"name": asked.name} | first("queries", asked.queries)


OPTIONS: Final[Mapping[Option, Callable[[bytes], Fields]]] = {
    Option.EXPORT_NAME: _export_name,
    Option.INFO: _info_data,
    Option.GO: _info_data,
    Option.LIST_META_CONTEXT: _meta_context_data,
    Option.SET_META_CONTEXT: _meta_context_data,
}
"""What the data of an option hold; other options have none."""


def option_reply(reply: OptionReply, data: bytes) -> Fields:
    """What the data of an option reply hold."""
    if reply.is_error:
        return {"text": wire.ErrorText.parse(data).message} if data else {}
    if reply == OptionReply.SERVER:
        return vars(wire.Server.parse(data))
    if reply == OptionReply.META_CONTEXT:
        return vars(wire.MetaContext.parse(data))
    if reply == OptionReply.INFO and (info := wire.parse_info(data)):
        return vars(info)
    return {"length": len(data)} if data else {}


# Requests and reply chunks -----------------------------------------------------------------------


def context_filter(payload: bytes, contexts: Contexts) -> Fields:
    """The payload of NBD_CMD_BLOCK_STATUS, valid or not; ``effect`` is its effect length."""
    count, rest = divmod(len(payload) - 8, 4)
    if count < 0 or rest:
        raise ProtocolError("malformed payload: its length is not 8 + n*4")
    effect, *ids = struct.unpack(f">Q{count}I", payload)
    return {"effect": effect} | first("contexts", [context_name(id_, contexts) for id_ in ids])


def looked_at(reply: ReplyType) -> int:
    """How many bytes of a chunk's payload `chunk` wants to see, at most."""
    if reply.is_error:
        return wire.ERROR_PAYLOAD.size + MAX_STRING + wire.ERROR_OFFSET.size
    return {
        ReplyType.OFFSET_DATA: wire.OFFSET_DATA.size,
        ReplyType.OFFSET_HOLE: wire.OFFSET_HOLE.size,
        ReplyType.BLOCK_STATUS: wire.BLOCK_STATUS.size + SHOWN * wire.DESCRIPTOR.size,
        ReplyType.BLOCK_STATUS_EXT: wire.BLOCK_STATUS_EXT.size + SHOWN * wire.DESCRIPTOR_EXT.size,
    }.get(reply, 0)


def chunk(reply: ReplyType, payload: bytes, length: int, contexts: Contexts) -> Fields:
    """What the payload of a chunk holds: ``length`` bytes, of which these are the first."""
    if reply.is_error:
        return _error(reply, payload)
    if reply == ReplyType.OFFSET_DATA:
        (offset,) = wire.OFFSET_DATA.unpack(payload)
        return {"offset": offset, "length": length - len(payload)}
    if reply == ReplyType.OFFSET_HOLE:
        offset, hole = wire.OFFSET_HOLE.unpack(payload)
        return {"offset": offset, "length": hole}
    if reply == ReplyType.BLOCK_STATUS:
        return _block_status(wire.BLOCK_STATUS, wire.DESCRIPTOR, payload, length, contexts)
    if reply == ReplyType.BLOCK_STATUS_EXT:
        return _block_status(wire.BLOCK_STATUS_EXT, wire.DESCRIPTOR_EXT, payload, length, contexts)
    return {"length": length} if length else {}


def _error(reply: ReplyType, payload: bytes) -> Fields:
    error, size = wire.ERROR_PAYLOAD.unpack_from(payload)
    end = wire.ERROR_PAYLOAD.size + size
    fields: Fields = {"error": Error(error)}
    if size:
        fields["text"] = payload[wire.ERROR_PAYLOAD.size : end].decode("utf-8", "replace")
    if reply == ReplyType.ERROR_OFFSET:
        fields["offset"] = wire.ERROR_OFFSET.unpack_from(payload, end)[0]
    return fields


def _block_status(
    head: struct.Struct,
    descriptor: struct.Struct,
    payload: bytes,
    length: int,
    contexts: Contexts,
) -> Fields:
    id_, *announced = head.unpack_from(payload)
    count, rest = divmod(length - head.size, descriptor.size)
    if rest or announced not in ([], [count]):
        raise ProtocolError("malformed chunk: its length does not match its descriptors")
    context = context_name(id_, contexts)
    pairs = descriptor.iter_unpack(payload[head.size :])
    extents = [Extent(size, _state(context, flags)) for size, flags in pairs]
    return {"context": context} | first("extents", extents, count)


def _state(context: object, flags: int) -> str:
    if context == BASE_ALLOCATION and flags < len(_ALLOCATION):
        return _ALLOCATION[flags]
    if context == QEMU_ALLOCATION_DEPTH:
        return f"depth {flags}"
    if str(context).startswith(QEMU_DIRTY_BITMAP) and flags < len(_DIRTY):
        return _DIRTY[flags]
    return f"{flags:#x}"
