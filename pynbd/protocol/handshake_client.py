"""Fixed-newstyle negotiation, the client's side, from the greeting to transmission.

"Newstyle negotiation", "Fixed newstyle negotiation" and "Option types" of the NBD specification.

1. As in `pynbd.protocol.handshake`, a negotiation is a generator of steps and knows no socket. It
   never asks for a byte past the current message.
2. What the server offers least is what is used: extended headers, else structured replies, else
   simple ones; NBD_OPT_GO, else NBD_OPT_EXPORT_NAME.
3. Whatever a server sends is checked. A message that contradicts the specification, or that was
   not asked for, is a `ProtocolError` that names it; NBD_REP_ERR_* is an `OptionError`.
4. An option is sent only when the one before it has its last reply.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pynbd.errors import OptionError, ProtocolError
from pynbd.protocol.handshake import ExportInfo, Session, StartTls, Step, Write, read
from pynbd.protocol.values import (
    EXPORT_NAME_PADDING,
    MAX_EXPORT_SIZE,
    MAX_PAYLOAD,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from pynbd.protocol.wire import (
    ClientFlags,
    ErrorText,
    ExportNameData,
    ExportNameReply,
    Greeting,
    InfoBlockSize,
    InfoData,
    InfoDescription,
    InfoExport,
    InfoName,
    MetaContext,
    MetaContextData,
    OptionHeader,
    OptionReplyHeader,
    Server,
    parse_info,
    quote,
)

ABORT: Final = OptionHeader(Option.ABORT, 0).build()
"""What a client says that leaves before transmission. The server may close without a reply."""

DEFAULT_BLOCK_SIZE: Final = (1, 4096, MAX_PAYLOAD)
"""Minimum, preferred and maximum payload, where the server states none ("Size constraints")."""

_OLDSTYLE_MAGIC: Final = (0x420281861253).to_bytes(8, "big")
_LARGEST_MINIMUM: Final = 1 << 16
_SMALLEST_PREFERRED: Final = 512

# No reply that is understood is longer than a name and a description.
_LONGEST_REPLY: Final = 1 << 16
_MOST_REPLIES: Final = 1 << 16
# All to one option together.
_LONGEST_REPLIES: Final = 32 << 20

# After these errors an attempt with less would fail as well.
_FINAL: Final = frozenset({OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN})
_REQUESTS: Final = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class RemoteExport(ExportInfo):
    """What a server tells about an export; ``flags`` are those that it sent.

    ``constrained``: whether it stated size constraints; else ``block_size`` is
    `DEFAULT_BLOCK_SIZE`. ``contexts``: those that were negotiated, or, in a listing, those that
    can be. ``structured``, ``extended``: which replies were negotiated when it was told; this is
    not a part of what it is.
    """

    constrained: bool = False
    structured: bool = field(default=False, compare=False)
    extended: bool = field(default=False, compare=False)


_Steps = Generator[Step, bytes | None, None]
Entering = Generator[Step, bytes | None, Session]
Listing = Generator[Step, bytes | None, list[RemoteExport]]


def enter(
    name: str,
    contexts: Sequence[str] = (),
    *,
    tls: bool = False,
    structured: bool = True,
    extended: bool = True,
) -> Entering:
    """Negotiate for an export; the session's transmission phase begins with the next byte.

    ``contexts``: names of metadata contexts, or queries that select several: "base:", "qemu:",
    "qemu:dirty-bitmap:". Those that the server does not have are left out. ``tls``: through TLS, or
    not at all. ``structured`` and ``extended`` say what is asked for at most.

    `OptionError` is the server's refusal, `ProtocolError` its violation of the protocol.
    """
    haggling = _Haggling(name)
    yield from haggling.greet()
    if tls:
        yield from haggling.start_tls()
    if not haggling.fixed:
        return (yield from haggling.export_name())
    yield from haggling.raise_headers(structured=structured, extended=extended)
    if contexts and (haggling.structured or haggling.extended):
        yield from haggling.select_contexts(contexts)
    return (yield from haggling.go())


def survey(*, tls: bool = False, structured: bool = True, extended: bool = True) -> Listing:
    """Ask for everything that the server lists; the negotiation goes on, the next is `ABORT`.

    `OptionError` says why the server does not list, or why one export is not described.
    """
    haggling = _Haggling("")
    yield from haggling.greet()
    if not haggling.fixed:
        raise OptionError(OptionReply.ERR_UNSUP, f"the server is too old for {Option.LIST}")
    if tls:
        yield from haggling.start_tls()
    yield from haggling.raise_headers(structured=structured, extended=extended)
    listed = yield from haggling.ask(Option.LIST, b"", OptionReply.SERVER)
    exports = {}
    for server in map(Server.parse, listed):
        haggling.name = server.name
        info = yield from haggling.info(Option.INFO, server.description)
        names = yield from haggling.list_contexts(())
        exports[server.name] = haggling.export(info, names)
    return list(exports.values())


def printable(text: str) -> str:
    """Return what a peer says to people as one line that no terminal takes for a command."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


@dataclass
class _Description:
    """The information about one export, as it comes in."""

    size: int
    flags: TransmissionFlag
    name: str | None = None
    description: str = ""
    block_size: tuple[int, int, int] | None = None


class _Haggling:
    """Option haggling with one server, for the export ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fixed = False
        self.structured = False
        self.extended = False
        self._no_zeroes = False
        self._selected: dict[int, str] = {}

    def greet(self) -> _Steps:
        data = yield from read(18)
        if data[8:16] == _OLDSTYLE_MAGIC:
            raise ProtocolError("the server speaks oldstyle NBD, which is not supported")
        flags = Greeting.parse(data).flags
        self.fixed = HandshakeFlag.FIXED_NEWSTYLE in flags
        self._no_zeroes = HandshakeFlag.NO_ZEROES in flags
        known = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        yield Write(ClientFlags(ClientFlag(flags & known)).build())

    def start_tls(self) -> _Steps:
        if not self.fixed:
            raise OptionError(OptionReply.ERR_UNSUP, "the server is too old for TLS")
        yield from self.ask(Option.STARTTLS, b"", OptionReply.ACK)
        yield StartTls()

    def ask(
        self, option: Option, data: bytes, expected: OptionReply
    ) -> Generator[Step, bytes | None, list[bytes]]:
        """Send an option; the data of all its replies, which are ``expected`` ones, before the
        final NBD_REP_ACK.
        """
        yield Write(OptionHeader(option, len(data)).build() + data)
        replies: list[bytes] = []
        room = _LONGEST_REPLIES
        while len(replies) <= _MOST_REPLIES:
            header = OptionReplyHeader.parse((yield from read(20)))
            if header.option != option:
                raise ProtocolError(f"a reply to {header.option} where {option} was asked")
            if header.length > _LONGEST_REPLY:
                raise ProtocolError(f"{header.reply} to {option} of {header.length} bytes")
            room -= header.length
            if room < 0:
                raise ProtocolError(f"more than {_LONGEST_REPLIES} bytes of replies to {option}")
            reply = yield from read(header.length)
            if header.reply.is_error:
                said = printable(ErrorText.parse(reply).message)
                text = f"{option}: {header.reply}{': ' if said else ''}{said}"
                raise OptionError(header.reply, text)
            if header.reply == OptionReply.ACK:
                if reply:
                    raise ProtocolError(f"{header.reply} to {option} with data")
                return replies
            if header.reply != expected:
                raise ProtocolError(f"{header.reply} as a reply to {option}")
            replies.append(reply)
        raise ProtocolError(f"more than {_MOST_REPLIES} replies to {option}")

    def raise_headers(self, *, structured: bool, extended: bool) -> _Steps:
        if extended:
            self.extended = yield from self._grants(Option.EXTENDED_HEADERS)
        if structured and not self.extended:
            self.structured = yield from self._grants(Option.STRUCTURED_REPLY)

    def _grants(self, option: Option) -> Generator[Step, bytes | None, bool]:
        try:
            yield from self.ask(option, b"", OptionReply.ACK)
        except OptionError as error:
            if error.reply in _FINAL:
                raise
            return False
        return True

    def list_contexts(
        self, queries: tuple[str, ...]
    ) -> Generator[Step, bytes | None, tuple[str, ...]]:
        """The names of the export's contexts that match a query, of all without queries."""
        data = MetaContextData(self.name, queries).build()
        try:
            replies = yield from self.ask(Option.LIST_META_CONTEXT, data, OptionReply.META_CONTEXT)
        except OptionError as error:
            # Without structured replies a server has no contexts, and may say so in this way.
            if error.reply in (OptionReply.ERR_UNSUP, OptionReply.ERR_INVALID):
                return ()
            raise
        return tuple(dict.fromkeys(MetaContext.parse(reply).name for reply in replies))

    def select_contexts(self, queries: Iterable[str]) -> _Steps:
        wanted = list(dict.fromkeys(queries))
        if any(query.endswith(":") for query in wanted):
            # The name of a bitmap may end like a wildcard: the list has it, if it is there.
            exact = [query for query in wanted if not query.endswith(":")]
            found = yield from self.list_contexts(tuple(wanted))
            wanted = list(dict.fromkeys([*exact, *found]))
        data = MetaContextData(self.name, tuple(wanted)).build()
        try:
            replies = yield from self.ask(Option.SET_META_CONTEXT, data, OptionReply.META_CONTEXT)
        except OptionError as error:
            if error.reply == OptionReply.ERR_UNSUP:
                return
            raise
        for context in map(MetaContext.parse, replies):
            if context.name not in wanted:
                raise ProtocolError(
                    f"metadata context {quote(context.name)} was selected, but not asked for"
                )
            if context.id in self._selected or context.name in self._selected.values():
                raise ProtocolError(f"metadata context {quote(context.name)} was selected twice")
            self._selected[context.id] = context.name

    def info(
        self, option: Option, description: str = ""
    ) -> Generator[Step, bytes | None, _Description]:
        """What NBD_OPT_INFO or NBD_OPT_GO tells; ``description`` if it tells none."""
        data = InfoData(self.name, _REQUESTS).build()
        replies = yield from self.ask(option, data, OptionReply.INFO)
        infos = list(map(parse_info, replies))
        exports = [info for info in infos if isinstance(info, InfoExport)]
        if len(exports) != 1:
            raise ProtocolError(f"{len(exports)} times {Info.EXPORT} in the reply to {option}")
        found = _Description(exports[0].size, exports[0].flags, description=description)
        for info in infos:
            if isinstance(info, InfoName):
                found.name = info.name
            elif isinstance(info, InfoDescription):
                found.description = info.description
            elif isinstance(info, InfoBlockSize):
                found.block_size = _checked_block_size(info)
        return found

    def go(self) -> Entering:
        try:
            info = yield from self.info(Option.GO)
        except OptionError as error:
            if error.reply != OptionReply.ERR_UNSUP or self.extended:
                raise
            return (yield from self.export_name())
        return self._session(info)

    def export_name(self) -> Entering:
        data = ExportNameData(self.name).build()
        yield Write(OptionHeader(Option.EXPORT_NAME, len(data)).build() + data)
        reply = ExportNameReply.parse((yield from read(10)))
        if not self._no_zeroes:
            yield from read(EXPORT_NAME_PADDING)  # what it holds is nobody's concern
        return self._session(_Description(reply.size, reply.flags))

    def _session(self, info: _Description) -> Session:
        return Session(
            export=self.export(info, tuple(self._selected.values())),
            flags=info.flags,
            structured=self.structured,
            extended=self.extended,
            contexts=self._selected,
        )

    def export(self, info: _Description, contexts: tuple[str, ...]) -> RemoteExport:
        if info.size > MAX_EXPORT_SIZE:
            raise ProtocolError(f"an export of {info.size} bytes, more than 2**63 - 1")
        return RemoteExport(
            name=self.name if info.name is None else info.name,
            description=info.description,
            size=info.size,
            flags=info.flags,
            block_size=info.block_size or DEFAULT_BLOCK_SIZE,
            contexts=contexts,
            constrained=info.block_size is not None,
            structured=self.structured,
            extended=self.extended,
        )


def _checked_block_size(info: InfoBlockSize) -> tuple[int, int, int]:
    minimum, preferred, maximum = sizes = info.minimum, info.preferred, info.maximum
    if minimum.bit_count() != 1 or minimum > _LARGEST_MINIMUM:
        raise ProtocolError(f"a minimum block size of {minimum}, not a power of 2 up to 65536")
    if preferred.bit_count() != 1 or preferred < max(minimum, _SMALLEST_PREFERRED):
        raise ProtocolError(
            f"a preferred block size of {preferred}, not a power of 2 from max({minimum}, 512)"
        )
    if maximum < preferred:
        raise ProtocolError(f"a maximum payload of {maximum}, below the preferred block size")
    return sizes
