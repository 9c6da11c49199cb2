"""Fixed-newstyle negotiation, the server's side, from the first byte to transmission.

"Newstyle negotiation", "Fixed newstyle negotiation" and "Option types" of the NBD specification.

1. `negotiate` is a generator that reads like blocking code. It yields a `Step` and is sent what
   the step brought; it knows no socket, and whoever drives it decides about time.
2. It never asks for a byte past the current message, so that nothing a client sends in clear can
   be taken for something that it sent inside TLS.
3. Data is read only where a valid option could have that much of it, and skipped elsewhere.
4. An option that fails is answered, and the next one is served. Only what the specification
   cannot answer ends the session: `ProtocolError`, and its text says why.
5. Nothing that was negotiated in clear is left once there is TLS.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from math import inf
from typing import Final, Protocol

from pynbd.errors import OptionError, ProtocolError
from pynbd.protocol.metadata import list_contexts, select_contexts
from pynbd.protocol.values import (
    EXPORT_NAME_PADDING,
    MAX_OPTION_LENGTH,
    MAX_STRING,
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
    InfoReply,
    MetaContext,
    MetaContextData,
    OptionHeader,
    Server,
    option_reply,
    quote,
)


@dataclass(frozen=True, slots=True)
class Read:
    """Read exactly ``size`` bytes (1 or more) and send them into the generator."""

    size: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Read ``size`` bytes (1 to 32 MiB), keep none of them, and send None."""

    size: int


@dataclass(frozen=True, slots=True)
class Write:
    """Write all of ``data`` and send None."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """Begin TLS, and send None once the peers have shaken hands. What comes next comes through
    it: whatever else has arrived by then is a part of the TLS handshake, or breaks it.
    """


Step = Read | Skip | Write | StartTls


class TlsMode(StrEnum):
    """The modes of operation of a server ("Negotiation" of TLS)."""

    NOTLS = "NOTLS"
    FORCEDTLS = "FORCEDTLS"
    """No option but NBD_OPT_STARTTLS and NBD_OPT_ABORT succeeds in clear."""
    SELECTIVETLS = "SELECTIVETLS"
    """In clear there are fewer exports; which, the directory knows."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What negotiation tells a client about an export.

    ``name`` is the canonical name and ``description`` may be empty. ``size`` is 0 to 2**63 - 1
    bytes. ``flags`` lacks SEND_DF and BLOCK_STATUS_PAYLOAD: negotiation adds these.
    ``block_size`` is the minimum block size, which is 1, the preferred one and the maximum
    payload, in bytes. The place of a metadata context in ``contexts`` is its id.
    """

    name: str
    description: str
    size: int
    flags: TransmissionFlag
    block_size: tuple[int, int, int]
    contexts: tuple[str, ...]


class ExportDirectory(Protocol):
    """The exports that a client may ask for, in clear or, after a `StartTls`, through TLS."""

    @property
    def stopping(self) -> bool:
        """Whether the server is shutting down: then no option but ABORT succeeds."""
        ...

    def find(self, name: str) -> ExportInfo | None:
        """Return the export of this name, "" being the default export; None is unknown."""
        ...

    def listing(self) -> Iterable[ExportInfo] | None:
        """Return the exports that may be listed; None forbids listing."""
        ...


@dataclass(frozen=True, slots=True)
class Session:
    """What was negotiated. ``extended`` outranks ``structured``; ``contexts`` is id to name."""

    export: ExportInfo
    flags: TransmissionFlag
    structured: bool
    extended: bool
    contexts: Mapping[int, str]


Negotiation = Generator[Step, bytes | None, Session | None]

_OUR_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES

_ENTERING: Final = frozenset({Option.EXPORT_NAME, Option.INFO, Option.GO})
"""The options, and no others, that may be answered with NBD_REP_ERR_TLS_REQD in SELECTIVETLS."""

_LONGEST_INFO: Final = 4 + MAX_STRING + 2 + 2 * 0xFFFF
"""A name, and every number of information requests that 16 bits can announce."""

_LONGEST_META: Final = 128 * 1024
"""120 bitmaps with the longest of names; a few milliseconds to parse, whatever the queries."""


def negotiate(
    exports: ExportDirectory,
    *,
    structured: bool = True,
    extended: bool = True,
    tls: TlsMode = TlsMode.NOTLS,
    max_options: int = 0,
    max_option_bytes: int = 0,
) -> Negotiation:
    """Negotiate with a client that has just connected.

    Return the session whose transmission phase begins with the client's next byte, or None after
    NBD_OPT_ABORT. ``structured`` and ``extended`` say whether NBD_OPT_STRUCTURED_REPLY and
    NBD_OPT_EXTENDED_HEADERS are supported. Of more options than ``max_options``, and of more bytes
    in them, one has enough; 0 is any number. ProtocolError asks for a hard disconnect.
    """
    yield Write(Greeting(_OUR_FLAGS).build())
    flags = ClientFlags.parse((yield from read(4))).flags
    if flags not in ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES:
        # "the server MUST drop the TCP connection if the client sets an unknown flag"
        raise ProtocolError(f"unknown client flags: {flags}")
    supported = {Option.STRUCTURED_REPLY: structured, Option.EXTENDED_HEADERS: extended}
    refused = frozenset(option for option, wanted in supported.items() if not wanted)
    haggling = _Haggling(exports, flags, refused, tls)
    return (yield from haggling.run(max_options or inf, max_option_bytes or inf))


def read(size: int) -> Generator[Step, bytes | None, bytes]:
    """The step that reads ``size`` bytes, none if that is 0; returns them. For either end."""
    if not size:
        return b""
    data = yield Read(size)
    assert data is not None
    assert len(data) == size
    return data


def _skip(size: int) -> Generator[Step, bytes | None, None]:
    if size:
        yield Skip(size)


class _Headers(IntEnum):
    """Which replies were negotiated; a greater one takes precedence over a lesser."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


_Replies = list[tuple[OptionReply, bytes]]


class _Haggling:
    """Option haggling with one client: what it has negotiated so far, and an answer to all else."""

    def __init__(
        self,
        exports: ExportDirectory,
        client: ClientFlag,
        refused: frozenset[Option],
        tls: TlsMode,
    ) -> None:
        self._exports = exports
        self._client = client
        self._refused = refused
        self._tls = tls
        self._secure = False  # what passes goes through TLS
        self._session: Session | None = None
        self._begin()

    def _begin(self) -> None:
        """Nothing is negotiated."""
        self._headers = _Headers.SIMPLE
        self._selected_for: ExportInfo | None = None
        self._selected: Mapping[int, str] = {}

    def run(self, most: float, most_bytes: float) -> Negotiation:
        """Serve options until one of them ends the haggling."""
        count = total = 0
        while self._session is None:
            header = OptionHeader.parse((yield from read(16)))
            if header.length > MAX_OPTION_LENGTH:
                raise ProtocolError(f"{header.option} announces {header.length} bytes of data")
            count, total = count + 1, total + 16 + header.length
            if count > most or total > most_bytes:
                raise ProtocolError(f"{count} options of {total} bytes, and no end of them")
            if header.option == Option.EXPORT_NAME:
                yield from self._export_name(header)
            elif ClientFlag.FIXED_NEWSTYLE not in self._client:
                raise ProtocolError(f"{header.option} without {ClientFlag.FIXED_NEWSTYLE}")
            elif header.option == Option.ABORT:
                # "a server SHOULD ignore any data sent by the client"
                yield from _skip(header.length)
                yield Write(option_reply(Option.ABORT, OptionReply.ACK))
                return None
            else:
                yield from self._option(header)
        return self._session

    def _export_name(self, header: OptionHeader) -> Generator[Step, bytes | None, None]:
        if header.length > MAX_STRING:
            raise ProtocolError(f"an export name of {header.length} bytes")
        data = yield from read(header.length)
        if self._exports.stopping:
            raise ProtocolError("the server is shutting down")
        if self._needs_tls(Option.EXPORT_NAME):
            raise ProtocolError(f"{Option.EXPORT_NAME} in clear, where TLS is required")
        if self._headers == _Headers.EXTENDED:
            raise ProtocolError(f"{Option.EXPORT_NAME} after {Option.EXTENDED_HEADERS}")
        try:
            export = self._find(ExportNameData.parse(data).name, header.option)
        except OptionError as error:
            # "If the chosen export does not exist [...] the server MUST terminate the session"
            raise ProtocolError(error.message) from error
        self._session = self._enter(export)
        reply = ExportNameReply(export.size, self._session.flags).build()
        if ClientFlag.NO_ZEROES not in self._client:
            reply += bytes(EXPORT_NAME_PADDING)
        yield Write(reply)

    def _option(self, header: OptionHeader) -> Generator[Step, bytes | None, None]:
        option, was_secure = header.option, self._secure
        kind = None if option in self._refused else _KINDS.get(option)
        if option == Option.SET_META_CONTEXT:
            # "replaces all previously-set metadata contexts (including when this command fails)"
            self._selected_for, self._selected = None, {}
        data = None
        needs_tls = self._needs_tls(option)
        if kind and header.length <= kind.longest and not needs_tls:
            data = yield from read(header.length)
        else:
            yield from _skip(header.length)
        try:
            if self._exports.stopping:
                raise OptionError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            if needs_tls:
                raise OptionError(OptionReply.ERR_TLS_REQD, "this server requires TLS")
            if not kind:
                raise OptionError(OptionReply.ERR_UNSUP, f"option {option} is not supported")
            if data is None:
                raise OptionError(kind.excess, f"{option} takes at most {kind.longest} bytes")
            replies = [*kind.answer(self, option, data), (OptionReply.ACK, b"")]
        except OptionError as error:
            replies = [(OptionReply(error.reply), ErrorText(error.message).build())]
        yield Write(b"".join(option_reply(option, reply, data) for reply, data in replies))
        if self._secure is not was_secure:
            self._begin()
            yield StartTls()

    # What each option does, and its replies before the final NBD_REP_ACK ---------------------

    def _starttls(self, _option: Option, _data: bytes) -> _Replies:
        if self._tls is TlsMode.NOTLS:
            raise OptionError(OptionReply.ERR_POLICY, "this server does not use TLS")
        if self._secure:
            raise OptionError(OptionReply.ERR_INVALID, "TLS is in use already")
        self._secure = True
        return []

    def _structured_reply(self, option: Option, _data: bytes) -> _Replies:
        if self._headers == _Headers.EXTENDED:
            raise OptionError(
                OptionReply.ERR_EXT_HEADER_REQD, "extended headers are already negotiated"
            )
        return self._raise_headers(_Headers.STRUCTURED, option)

    def _extended_headers(self, option: Option, _data: bytes) -> _Replies:
        return self._raise_headers(_Headers.EXTENDED, option)

    def _raise_headers(self, headers: _Headers, option: Option) -> _Replies:
        if self._headers == headers:
            raise OptionError(OptionReply.ERR_INVALID, f"{option} is already negotiated")
        self._headers = headers
        return []

    def _list(self, _option: Option, _data: bytes) -> _Replies:
        listing = self._exports.listing()
        if listing is None:
            raise OptionError(OptionReply.ERR_POLICY, "this server does not list its exports")
        return [
            (OptionReply.SERVER, Server(export.name, export.description).build())
            for export in listing
        ]

    def _info(self, option: Option, data: bytes) -> _Replies:
        request = InfoData.parse(data)
        export = self._find(request.name, option)
        flags = self._flags(export)
        if self._headers == _Headers.EXTENDED:
            # Contexts may yet be selected: only GO leaves the flag out where there are none.
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return _describe(export, flags, request.requests)

    def _go(self, option: Option, data: bytes) -> _Replies:
        request = InfoData.parse(data)
        self._session = self._enter(self._find(request.name, option))
        return _describe(self._session.export, self._session.flags, request.requests)

    def _list_meta_context(self, option: Option, data: bytes) -> _Replies:
        request = MetaContextData.parse(data)
        names = list_contexts(self._find(request.name, option).contexts, request.queries)
        # "The metadata context ID in these replies is reserved and SHOULD be set to zero"
        return [(OptionReply.META_CONTEXT, MetaContext(0, name).build()) for name in names]

    def _set_meta_context(self, option: Option, data: bytes) -> _Replies:
        if self._headers == _Headers.SIMPLE:
            raise OptionError(
                OptionReply.ERR_INVALID, "structured replies or extended headers come first"
            )
        request = MetaContextData.parse(data)
        export = self._find(request.name, option)
        self._selected_for = export
        self._selected = select_contexts(export.contexts, request.queries)
        return [
            (OptionReply.META_CONTEXT, MetaContext(id_, name).build())
            for id_, name in self._selected.items()
        ]

    # What they share -------------------------------------------------------------------------

    def _needs_tls(self, option: Option) -> bool:
        """Whether ``option`` cannot be served in clear, whatever export it asks for."""
        forced = self._tls is TlsMode.FORCEDTLS and not self._secure
        return forced and option != Option.STARTTLS

    def _find(self, name: str, option: Option) -> ExportInfo:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise OptionError(OptionReply.ERR_UNKNOWN, "the name is not UTF-8") from None
        export = self._exports.find(name)
        if export is None:
            if self._tls is TlsMode.SELECTIVETLS and not self._secure and option in _ENTERING:
                # One that is only there through TLS is told from none by nobody: both say this.
                text = "there is no such export, or it requires TLS"
                raise OptionError(OptionReply.ERR_TLS_REQD, text)
            text = f"there is no export {quote(name)}" if name else "there is no default export"
            raise OptionError(OptionReply.ERR_UNKNOWN, text)
        return export

    def _flags(self, export: ExportInfo) -> TransmissionFlag:
        if self._headers == _Headers.SIMPLE:
            return export.flags
        return export.flags | TransmissionFlag.SEND_DF

    def _enter(self, export: ExportInfo) -> Session:
        """Return the session with an export; contexts selected for another one are void."""
        same = self._selected_for is not None and (
            (self._selected_for.name, self._selected_for.contexts) == (export.name, export.contexts)
        )
        contexts = self._selected if same else {}
        flags = self._flags(export)
        if contexts and self._headers == _Headers.EXTENDED:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return Session(
            export=export,
            flags=flags,
            structured=self._headers >= _Headers.STRUCTURED,
            extended=self._headers == _Headers.EXTENDED,
            contexts=contexts,
        )


def _describe(export: ExportInfo, flags: TransmissionFlag, requests: tuple[int, ...]) -> _Replies:
    infos: list[InfoReply] = [InfoExport(export.size, flags), InfoBlockSize(*export.block_size)]
    if Info.NAME in requests:
        infos.append(InfoName(export.name))
    if export.description:
        infos.append(InfoDescription(export.description))
    return [(OptionReply.INFO, info.build()) for info in infos]


@dataclass(frozen=True, slots=True)
class _Kind:
    """An option that is answered, how much data it can have, and the answer to more of it."""

    answer: Callable[[_Haggling, Option, bytes], _Replies]
    longest: int = 0
    excess: OptionReply = OptionReply.ERR_INVALID


_KINDS: Final[Mapping[Option, _Kind]] = {
    Option.LIST: _Kind(_Haggling._list),
    Option.STARTTLS: _Kind(_Haggling._starttls),
    Option.INFO: _Kind(_Haggling._info, _LONGEST_INFO),
    Option.GO: _Kind(_Haggling._go, _LONGEST_INFO),
    Option.STRUCTURED_REPLY: _Kind(_Haggling._structured_reply),
    Option.LIST_META_CONTEXT: _Kind(
        _Haggling._list_meta_context, _LONGEST_META, OptionReply.ERR_TOO_BIG
    ),
    Option.SET_META_CONTEXT: _Kind(
        _Haggling._set_meta_context, _LONGEST_META, OptionReply.ERR_TOO_BIG
    ),
    Option.EXTENDED_HEADERS: _Kind(_Haggling._extended_headers),
}
