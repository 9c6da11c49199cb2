"""Every message of NBD, to be built and to be parsed, for the server's side and the client's.

"Newstyle negotiation", "Option types" and "Option reply types" of the NBD specification are
declared with construct: these messages are small and rare, and what a stranger sends is parsed
by them. The fixed parts of "Request message", "Simple reply message", "Structured reply chunk
message" and "Extended reply chunk message" are `struct.Struct`, some 40 times faster.

1. All integers are big-endian.
2. A length is believed only as far as there are bytes, and a message is consumed exactly.
3. A string holds no NUL. It is ``str`` in Python; bytes that are not UTF-8 become surrogates
   (``surrogateescape``), so that every name can be compared and none can fail to decode.
4. A malformed option is an `OptionError` (NBD_REP_ERR_INVALID), any other malformed message a
   `ProtocolError`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

from construct import (
    Const,
    ConstError,
    Construct,
    ConstructError,
    ExprAdapter,
    GreedyBytes,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    Struct,
    Terminated,
    TerminatedError,
    ValidationError,
)

from pynbd.errors import OptionError, ProtocolError, PynbdError
from pynbd.protocol.values import (
    IHAVEOPT,
    MAX_ERROR_MESSAGE,
    MAX_STRING,
    NBDMAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

# Transmission ------------------------------------------------------------------------------------

COMPACT_REQUEST: Final = struct.Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length"""

EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
"""magic, command flags, type, cookie, offset, payload or effect length"""

SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""magic, error, cookie"""

STRUCTURED_CHUNK: Final = struct.Struct(">IHHQI")
"""magic, reply flags, type, cookie, length of payload"""

EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
"""magic, reply flags, type, cookie, offset of the request, length of payload"""

STRUCTURED_DATA: Final = struct.Struct(">IHHQIQ")
"""STRUCTURED_CHUNK, and the offset that opens NBD_REPLY_TYPE_OFFSET_DATA"""

EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
"""EXTENDED_CHUNK, and the offset that opens NBD_REPLY_TYPE_OFFSET_DATA"""

OFFSET_DATA: Final = struct.Struct(">Q")
"""offset; the data follow"""

OFFSET_HOLE: Final = struct.Struct(">QI")
"""offset, hole size"""

ERROR_PAYLOAD: Final = struct.Struct(">IH")
"""error, message length; the message follows"""

ERROR_OFFSET: Final = struct.Struct(">Q")
"""offset, after the message of NBD_REPLY_TYPE_ERROR_OFFSET"""

BLOCK_STATUS: Final = struct.Struct(">I")
"""metadata context id; descriptors follow"""

BLOCK_STATUS_EXT: Final = struct.Struct(">II")
"""metadata context id, descriptor count; descriptors follow"""

DESCRIPTOR: Final = struct.Struct(">II")
"""extent length, status flags"""

DESCRIPTOR_EXT: Final = struct.Struct(">QQ")
"""extent length, status flags"""

# Strings and lists -------------------------------------------------------------------------------


def _decode_string(data: bytes) -> str:
    if 0 in data:
        raise ValidationError("a string contains NUL")
    return data.decode("utf-8", "surrogateescape")


def encode_string(text: str) -> bytes:
    """Return the bytes of a string, those that are not UTF-8 included."""
    return text.encode("utf-8", "surrogateescape")


def _decode_short_string(data: bytes) -> str:
    if len(data) > MAX_STRING:
        raise ValidationError(f"a string is longer than {MAX_STRING} bytes")
    return _decode_string(data)


def _decode_requests(data: bytes) -> tuple[int, ...]:
    if len(data) < 2 or len(data) != 2 + 2 * int.from_bytes(data[:2], "big"):
        raise ValidationError("the number of information requests does not match the length")
    return struct.unpack_from(f">{len(data) // 2 - 1}H", data, 2)


def _encode_requests(requests: tuple[int, ...]) -> bytes:
    return struct.pack(f">H{len(requests)}H", len(requests), *requests)


def _decode_queries(data: bytes) -> tuple[str, ...]:
    """Parse 32 bits of count, then 32 bits of length and a string for each query.

    Not a construct declaration: a peer may send tens of thousands of empty queries.
    """
    queries = []
    length_at = struct.Struct(">I").unpack_from
    try:
        (count,) = length_at(data)
        end = 4
        for _ in range(count):
            (length,) = length_at(data, end)
            start, end = end + 4, end + 4 + length
            if end > len(data):
                raise ValidationError("a query runs past the end of the data")
            queries.append(_decode_string(data[start:end]))
    except struct.error:
        raise ValidationError("there are fewer queries than announced") from None
    if end != len(data):
        raise ValidationError("bytes follow the last query")
    return tuple(queries)


def _encode_queries(queries: tuple[str, ...]) -> bytes:
    encoded = [encode_string(query) for query in queries]
    return b"".join(
        [struct.pack(">I", len(encoded)), *(struct.pack(">I", len(q)) + q for q in encoded)]
    )


def encode_message(text: str) -> bytes:
    """Return an error message as it is sent: UTF-8, at most MAX_ERROR_MESSAGE bytes.

    Cut in the middle of a character, the rest of it goes as well.
    """
    return text.encode("utf-8", "replace")[:MAX_ERROR_MESSAGE].decode("utf-8", "ignore").encode()


def quote(text: str) -> str:
    """Return what a peer sent as it may be shown to people: printable, at most 80 characters."""
    return repr(text[:80]) + "..." * (len(text) > 80)


def _adapted(
    layout: Construct, decode: Callable[[Any], object], encode: Callable[[Any], object]
) -> Construct:
    return ExprAdapter(layout, lambda raw, _: decode(raw), lambda value, _: encode(value))


_Text = _adapted(GreedyBytes, _decode_short_string, encode_string)
_Name = Prefixed(Int32ub, _Text)

# Messages of the handshake -----------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """A message that is built and parsed whole; ``layout`` lists its fields in their order."""

    layout: ClassVar[Construct]

    def build(self) -> bytes:
        """Return the bytes of this message."""
        return bytes(self.layout.build(vars(self)))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the message that ``data`` is, from its first byte to its last."""
        try:
            parsed = cls.layout.parse(data)
        except ConstError:
            raise cls._malformed("wrong magic number") from None
        except ValidationError as error:
            raise cls._malformed(str(error)) from None
        except TerminatedError:
            raise cls._malformed("bytes follow its end") from None
        except ConstructError:
            raise cls._malformed("it is shorter than its fields") from None
        return cls(**{field.name: parsed[field.name] for field in fields(cls)})

    @classmethod
    def _malformed(cls, reason: str) -> PynbdError:
        return ProtocolError(f"malformed {cls.__name__}: {reason}")


class OptionData(Message):
    """The data of an option: when it is malformed, the option fails and haggling goes on."""

    @classmethod
    def _malformed(cls, reason: str) -> PynbdError:
        return OptionError(OptionReply.ERR_INVALID, f"malformed option data: {reason}")


@dataclass(frozen=True)
class Greeting(Message):
    """What the server says first: 18 bytes."""

    flags: HandshakeFlag
    layout = Struct(
        Const(NBDMAGIC, Int64ub),
        Const(IHAVEOPT, Int64ub),
        "flags" / _adapted(Int16ub, HandshakeFlag, int),
        Terminated,
    )


@dataclass(frozen=True)
class ClientFlags(Message):
    """The client's answer to the greeting: 4 bytes."""

    flags: ClientFlag
    layout = Struct("flags" / _adapted(Int32ub, ClientFlag, int), Terminated)


@dataclass(frozen=True)
class OptionHeader(Message):
    """What precedes the data of each option: 16 bytes. ``length`` is that of the data."""

    option: Option
    length: int
    layout = Struct(
        Const(IHAVEOPT, Int64ub),
        "option" / _adapted(Int32ub, Option, int),
        "length" / Int32ub,
        Terminated,
    )


@dataclass(frozen=True)
class OptionReplyHeader(Message):
    """What precedes the data of each option reply: 20 bytes. ``length`` is that of the data."""

    option: Option
    reply: OptionReply
    length: int
    layout = Struct(
        Const(OPTION_REPLY_MAGIC, Int64ub),
        "option" / _adapted(Int32ub, Option, int),
        "reply" / _adapted(Int32ub, OptionReply, int),
        "length" / Int32ub,
        Terminated,
    )


@dataclass(frozen=True)
class ExportNameReply(Message):
    """The reply to NBD_OPT_EXPORT_NAME: 10 bytes; 124 zeroes may follow."""

    size: int
    flags: TransmissionFlag
    layout = Struct(
        "size" / Int64ub, "flags" / _adapted(Int16ub, TransmissionFlag, int), Terminated
    )


@dataclass(frozen=True)
class ExportNameData(OptionData):
    """The data of NBD_OPT_EXPORT_NAME: nothing but the name."""

    name: str
    layout = Struct("name" / _Text)


@dataclass(frozen=True)
class InfoData(OptionData):
    """The data of NBD_OPT_INFO and NBD_OPT_GO: a name and the information asked for."""

    name: str
    requests: tuple[int, ...]
    layout = Struct(
        "name" / _Name, "requests" / _adapted(GreedyBytes, _decode_requests, _encode_requests)
    )


@dataclass(frozen=True)
class MetaContextData(OptionData):
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.

    A query may be longer than a string is allowed to be: such a query selects nothing.
    """

    name: str
    queries: tuple[str, ...]
    layout = Struct(
        "name" / _Name, "queries" / _adapted(GreedyBytes, _decode_queries, _encode_queries)
    )


@dataclass(frozen=True)
class Server(Message):
    """The data of NBD_REP_SERVER: an export in the answer to NBD_OPT_LIST."""

    name: str
    description: str
    layout = Struct("name" / _Name, "description" / _Text)


@dataclass(frozen=True)
class MetaContext(Message):
    """The data of NBD_REP_META_CONTEXT. ``id`` is 0 in the answer to LIST_META_CONTEXT."""

    id: int
    name: str
    layout = Struct("id" / Int32ub, "name" / _Text)


@dataclass(frozen=True)
class ErrorText(Message):
    """The data of NBD_REP_ERR_*: a text for people; one too long is cut."""

    message: str
    layout = Struct(
        "message"
        / _adapted(GreedyBytes, lambda data: data.decode("utf-8", "replace"), encode_message)
    )


@dataclass(frozen=True)
class InfoExport(Message):
    """NBD_INFO_EXPORT in the data of NBD_REP_INFO. ``size`` in bytes."""

    size: int
    flags: TransmissionFlag
    layout = Struct(
        Const(Info.EXPORT, Int16ub),
        "size" / Int64ub,
        "flags" / _adapted(Int16ub, TransmissionFlag, int),
        Terminated,
    )


@dataclass(frozen=True)
class InfoName(Message):
    """NBD_INFO_NAME in the data of NBD_REP_INFO: the canonical name."""

    name: str
    layout = Struct(Const(Info.NAME, Int16ub), "name" / _Text)


@dataclass(frozen=True)
class InfoDescription(Message):
    """NBD_INFO_DESCRIPTION in the data of NBD_REP_INFO."""

    description: str
    layout = Struct(Const(Info.DESCRIPTION, Int16ub), "description" / _Text)


@dataclass(frozen=True)
class InfoBlockSize(Message):
    """NBD_INFO_BLOCK_SIZE in the data of NBD_REP_INFO: the size constraints, in bytes."""

    minimum: int
    preferred: int
    maximum: int
    layout = Struct(
        Const(Info.BLOCK_SIZE, Int16ub),
        "minimum" / Int32ub,
        "preferred" / Int32ub,
        "maximum" / Int32ub,
        Terminated,
    )


InfoReply = InfoExport | InfoName | InfoDescription | InfoBlockSize

_INFO_REPLIES: Final[dict[int, type[InfoReply]]] = {
    Info.EXPORT: InfoExport,
    Info.NAME: InfoName,
    Info.DESCRIPTION: InfoDescription,
    Info.BLOCK_SIZE: InfoBlockSize,
}


def parse_info(data: bytes) -> InfoReply | None:
    """Return the information in the data of NBD_REP_INFO; None is a kind not to be understood."""
    if len(data) < 2:
        raise ProtocolError("malformed NBD_REP_INFO: no information type")
    kind = _INFO_REPLIES.get(int.from_bytes(data[:2], "big"))
    return kind.parse(data) if kind else None


def option_reply(option: Option, reply: OptionReply, data: bytes = b"") -> bytes:
    """Return a whole option reply, header and data."""
    return OptionReplyHeader(option, reply, len(data)).build() + data
