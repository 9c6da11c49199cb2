"""The numbers of the NBD protocol, under the names that its specification gives them.

Section "Values" of the NBD specification, the magic numbers of "Protocol phases" and the limits of
"Conventions" and "Size constraints".

1. A member drops the prefix that its family shares: `Command.BLOCK_STATUS`.
2. ``str()`` puts it back, ``NBD_CMD_BLOCK_STATUS``, so that a log can be searched for what the
   specification says. Flags are joined by ``|``.
3. A number that the specification does not know is kept, and prints as hexadecimal: peers may
   send anything, and what they sent is what a log should show.
"""

from enum import IntEnum, IntFlag
from typing import ClassVar, Final, Self

# The greeting, and the header of each option ("Newstyle negotiation").
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

# The headers of requests and replies ("Transmission").
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

DEFAULT_PORT: Final = 10809

MAX_STRING: Final = 4096
"""Bytes in a name, a query, a description or an error text ("Conventions")."""

MAX_EXPORT_SIZE: Final = 2**63 - 1
"""Bytes in an export. Clients keep sizes in a signed 64-bit integer."""

MAX_PAYLOAD: Final = 32 * 1024 * 1024
"""Bytes that a client may send or ask for at once; what no peer may call an attack."""

MAX_OPTION_LENGTH: Final = 32 * 1024 * 1024
"""Bytes of option data that are still skipped; whoever announces more is disconnected."""

MAX_ERROR_MESSAGE: Final = 900
"""Bytes of text in an error. QEMU's client drops the connection above 1000 bytes of payload."""

EXPORT_NAME_PADDING: Final = 124
"""Zeroes after the reply to NBD_OPT_EXPORT_NAME, unless NBD_FLAG_C_NO_ZEROES was negotiated."""


class _Prefixed:
    """Keeps the prefix that the members of an enumeration share in the specification."""

    _prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls._prefix = prefix


class _Named(_Prefixed, IntEnum):
    """An enumeration whose members print as the specification names them."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int) or value < 0:
            return None
        unknown = int.__new__(cls, value)
        unknown._name_ = f"{value:#x}"
        unknown._value_ = value
        return unknown

    def __str__(self) -> str:
        known = self._name_ in type(self).__members__
        return self._prefix + self._name_ if known else self._name_


class _NamedFlag(_Prefixed, IntFlag):
    """A set of bits whose members print as the specification names them."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        # IntFlag's own keeps every value that it ever met, and peers may send any of four billion.
        if not isinstance(value, int):
            return None
        # A negative value is a complement. IntFlag's own holds named bits only, and
        # ``flags & ~legal`` would overlook the others, which are what a server has to refuse;
        # here it holds all bits of the widest field.
        if value < 0:
            value &= 0xFFFFFFFF
        unnamed = int.__new__(cls, value)
        unnamed._name_ = None
        unnamed._value_ = value
        return unnamed

    def __str__(self) -> str:
        names = [f"{self._prefix}{flag.name}" for flag in self]
        if unknown := int(self) - sum(self):
            names.append(f"{unknown:#x}")
        return "|".join(names) or "0"


class HandshakeFlag(_NamedFlag, prefix="NBD_FLAG_"):
    """16 bits that the server sends in its greeting ("Handshake flags")."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(_NamedFlag, prefix="NBD_FLAG_C_"):
    """32 bits with which the client answers the greeting ("Client flags")."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(_NamedFlag, prefix="NBD_FLAG_"):
    """16 bits that say what an export can do ("Transmission flags")."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(_Named, prefix="NBD_OPT_"):
    """What a client asks for during option haggling ("Option types")."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(_Named, prefix="NBD_REP_"):
    """What a server answers to an option; bit 31 marks an error ("Option reply types")."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10

    @property
    def is_error(self) -> bool:
        """Whether the option failed."""
        return bool(self & 2**31)


class Info(_Named, prefix="NBD_INFO_"):
    """What NBD_REP_INFO tells about an export ("Option reply types")."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(_Named, prefix="NBD_CMD_"):
    """What a request asks for ("Request types")."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(_NamedFlag, prefix="NBD_CMD_FLAG_"):
    """16 bits that say how a request is to be served ("Command flags")."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(_NamedFlag, prefix="NBD_REPLY_FLAG_"):
    """16 bits in each reply chunk ("Structured and extended header reply flags")."""

    DONE = 1 << 0


class ReplyType(_Named, prefix="NBD_REPLY_TYPE_"):
    """What a reply chunk carries; bit 15 marks an error ("Structured reply types")."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2

    @property
    def is_error(self) -> bool:
        """Whether the chunk reports an error."""
        return bool(self & 2**15)


class State(_NamedFlag, prefix="NBD_STATE_"):
    """The flags of an extent in the metadata context ``base:allocation``."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class Error(_Named, prefix="NBD_"):
    """Why a request failed ("Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108
