"""The model of a negotiation, from "Newstyle negotiation" to "Option types" in the NBD
specification, with the decisions of docs/protocol-support.md (rows H, O, S, M and T).

`Negotiation` takes the bytes that a client sends, whatever they are, and says what the server has
to answer. It imports nothing of pynbd.

1. Options are cut from the stream by their headers; what is not complete yet is not answered.
2. An `Answer` names all replies that are right: where the specification leaves a choice, several.
3. What an answer brings is checked once it is there, and remembered where later ones depend on it:
   the ids of contexts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

from tests.conformance.client import (
    C_FIXED_NEWSTYLE,
    C_NO_ZEROES,
    IHAVEOPT,
    Flag,
    Info,
    Mode,
    Option,
    Rep,
)

MAX_OPTION = 32 << 20
MAX_STRING = 4096
MAX_META = 64 << 10
"""Bytes of queries that a server has to look at; more may be too big for it (row M31)."""


@dataclass(frozen=True)
class Known:
    """What clients may be told of an export; ``content`` is what it reads as."""

    name: str
    description: str
    flags: Flag
    contexts: Sequence[str]
    content: bytes


class Then(Enum):
    """How the session goes on."""

    GOES_ON = "the next option is served"
    TLS = "the client's TLS handshake is to come next"
    TRANSMISSION = "the transmission phase begins"
    ENDS = "the server closes"


def _nothing(payloads: Sequence[tuple[int, bytes]]) -> None:
    assert not payloads


@dataclass(frozen=True)
class Answer:
    """What is right. ``replies``: the types that the last reply may have, none for silence.
    ``check`` looks at the (type, data) of those before an ACK. ``raw``: the reply to EXPORT_NAME.
    """

    option: int = 0
    replies: frozenset[Rep] = frozenset()
    then: Then = Then.GOES_ON
    check: Callable[[Sequence[tuple[int, bytes]]], None] = _nothing
    raw: bytes = b""


_CLOSES = Answer(then=Then.ENDS)


class _Invalid(Exception):
    """Data that is not what an option takes; ``replies``: the errors that say so."""

    def __init__(self, *replies: Rep) -> None:
        self.replies = frozenset(replies or (Rep.ERR_INVALID,))


class _Name(NamedTuple):
    raw: bytes
    rest: bytes


def _name(data: bytes) -> _Name:
    """A 32-bit length and a name of so many bytes, of what there is."""
    if len(data) < 4:
        raise _Invalid
    end = 4 + int.from_bytes(data[:4])
    if end > len(data):
        raise _Invalid
    if end - 4 > MAX_STRING:
        raise _Invalid(Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    return _Name(data[4:end], data[end:])


def _infos(data: bytes) -> tuple[bytes, set[int]]:
    """The data of INFO and GO: a name and the types of information asked for."""
    name, rest = _name(data)
    if len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2]) or b"\0" in name:
        raise _Invalid
    return name, {int.from_bytes(rest[at : at + 2]) for at in range(2, len(rest), 2)}


def _queries(data: bytes) -> tuple[bytes, list[bytes]]:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name, rest = _name(data)
    if len(rest) < 4 or b"\0" in name:
        raise _Invalid
    queries, at = [], 4
    for _ in range(int.from_bytes(rest[:4])):
        end = at + 4 + int.from_bytes(rest[at : at + 4])
        if len(rest) < at + 4 or end > len(rest) or b"\0" in rest[at + 4 : end]:
            raise _Invalid
        queries.append(rest[at + 4 : end])
        at = end
    if at != len(rest):
        raise _Invalid
    return name, queries


class Negotiation:
    """One client's. ``refused``: options that the server does not offer. ``tls``: its mode."""

    def __init__(
        self, exports: Sequence[Known], refused: frozenset[int], tls: str = "NOTLS"
    ) -> None:
        self._exports = exports
        self._refused = refused
        self._tls = tls
        self.secure = False
        self._stream = b""
        self._client_flags: int | None = None
        self._selected: tuple[Known, set[str]] | None = None
        self._ids: Mapping[int, str] = {}
        self.stopping = False
        self.mode = Mode.SIMPLE
        self.export: Known | None = None
        """The one that the session is on, from GO on."""

    @property
    def contexts(self) -> Mapping[int, str]:
        """What BLOCK_STATUS answers for, by id."""
        valid = self._selected is not None and self._selected[0] is self.export
        return self._ids if valid else {}

    @property
    def _closed_in_clear(self) -> bool:
        return self._tls == "FORCEDTLS" and not self.secure

    @property
    def missing(self) -> int:
        """Bytes that the message under way has yet to bring; 0 between two of them."""
        if self._client_flags is None:
            return 4 - len(self._stream)
        if not self._stream:
            return 0
        if len(self._stream) < 16:
            return 16 - len(self._stream)
        return 16 + int.from_bytes(self._stream[12:16]) - len(self._stream)

    @property
    def lost(self) -> int:
        """Bytes that came after the end of the negotiation."""
        return len(self._stream)

    def take(self, data: bytes) -> Iterator[Answer]:
        """The answers to what is complete with these bytes; those after the end are lost."""
        self._stream += data
        while (answer := self._next()) is not None:
            yield answer
            if answer.then is not Then.GOES_ON:
                return

    def _next(self) -> Answer | None:
        if self._client_flags is None:
            if len(self._stream) < 4:
                return None
            self._client_flags = int.from_bytes(self._stream[:4])
            self._stream = self._stream[4:]
            if self._client_flags & ~(C_FIXED_NEWSTYLE | C_NO_ZEROES):
                return _CLOSES
        if len(self._stream) < 16:
            return None
        magic, code, length = struct.unpack(">8sII", self._stream[:16])
        if magic != IHAVEOPT or length > MAX_OPTION:
            return _CLOSES
        if code == Option.EXPORT_NAME:
            if length > MAX_STRING:
                return _CLOSES
        elif not self._client_flags & C_FIXED_NEWSTYLE:
            return _CLOSES
        if len(self._stream) < 16 + length:
            return None
        data, self._stream = self._stream[16 : 16 + length], self._stream[16 + length :]
        if code == Option.EXPORT_NAME:
            return self._export_name(data)
        if code == Option.ABORT:
            return Answer(code, frozenset({Rep.ACK}), Then.ENDS)
        return self._option(code, data)

    def _export_name(self, data: bytes) -> Answer:
        assert self._client_flags is not None
        try:
            found = self._find(data)
        except _Invalid:
            return _CLOSES
        if self.stopping or self.mode is Mode.EXTENDED or b"\0" in data or self._closed_in_clear:
            return _CLOSES
        self.export = found
        raw = struct.pack(">QH", len(found.content), self._flags(found))
        padding = b"" if self._client_flags & C_NO_ZEROES else bytes(124)
        return Answer(Option.EXPORT_NAME, then=Then.TRANSMISSION, raw=raw + padding)

    def _option(self, code: int, data: bytes) -> Answer:
        if code == Option.SET_META_CONTEXT:  # "including when this command fails"
            self._selected, self._ids = None, {}
        answer = self._ANSWERS.get(Option(code)) if code in set(Option) else None
        needs_tls = self._closed_in_clear and code != Option.STARTTLS
        try:
            if self.stopping:
                raise _Invalid(Rep.ERR_SHUTDOWN, *[Rep.ERR_TLS_REQD] * needs_tls)
            if needs_tls:
                raise _Invalid(Rep.ERR_TLS_REQD)
            if answer is None or code in self._refused:
                raise _Invalid(Rep.ERR_UNSUP)
            return answer(self, Option(code), data)
        except _Invalid as invalid:
            return Answer(code, invalid.replies)

    def _find(self, name: bytes) -> Known:
        try:
            wanted = name.decode()
        except UnicodeDecodeError:
            raise _Invalid(Rep.ERR_UNKNOWN, Rep.ERR_INVALID) from None
        if not wanted:
            return self._exports[0]
        for export in self._exports:
            if export.name == wanted:
                return export
        raise _Invalid(Rep.ERR_UNKNOWN)

    def _flags(self, export: Known) -> Flag:
        return export.flags | (0 if self.mode is Mode.SIMPLE else Flag.SEND_DF)

    # Each option

    def _starttls(self, code: Option, data: bytes) -> Answer:
        none = [Rep.ERR_POLICY, Rep.ERR_UNSUP] if self._tls == "NOTLS" else []
        if data or self.secure:
            raise _Invalid(Rep.ERR_INVALID, *none)
        if none:
            raise _Invalid(*none)
        self.secure = True
        self.mode = Mode.SIMPLE
        self._selected, self._ids = None, {}
        return Answer(code, frozenset({Rep.ACK}), Then.TLS)

    def _headers(self, code: Option, data: bytes) -> Answer:
        structured = code == Option.STRUCTURED_REPLY
        if structured and self.mode is Mode.EXTENDED:
            raise _Invalid(Rep.ERR_EXT_HEADER_REQD, *[Rep.ERR_INVALID] * bool(data))
        mode = Mode.STRUCTURED if structured else Mode.EXTENDED
        if data or self.mode is mode:
            raise _Invalid
        self.mode = mode
        return Answer(code, frozenset({Rep.ACK}))

    def _list(self, code: Option, data: bytes) -> Answer:
        if data:
            raise _Invalid

        def check(payloads: Sequence[tuple[int, bytes]]) -> None:
            told = []
            for kind, payload in payloads:
                assert kind == Rep.SERVER
                name, description = _name(payload)
                told.append((name.decode(), description.decode()))
            assert sorted(told) == sorted((each.name, each.description) for each in self._exports)

        return Answer(code, frozenset({Rep.ACK}), check=check)

    def _info(self, code: Option, data: bytes) -> Answer:
        name, wanted = _infos(data)
        try:
            export = self._find(name)
        except _Invalid as invalid:
            maybe = self._tls == "SELECTIVETLS" and not self.secure
            raise _Invalid(*invalid.replies, *[Rep.ERR_TLS_REQD] * maybe) from None
        flags = self._flags(export)
        then = Then.GOES_ON
        if code == Option.GO:
            self.export = export
            then = Then.TRANSMISSION
        # Row F10: after GO only with contexts; before it, some may yet be selected.
        if self.mode is Mode.EXTENDED and (code == Option.INFO or self.contexts):
            flags |= Flag.BLOCK_STATUS_PAYLOAD

        def check(payloads: Sequence[tuple[int, bytes]]) -> None:
            assert {kind for kind, _ in payloads} == {Rep.INFO}
            told = {int.from_bytes(payload[:2]): payload[2:] for _, payload in payloads}
            assert len(told) == len(payloads), "an information was sent twice"
            said = told.pop(Info.EXPORT)
            assert struct.unpack(">QH", said) == (len(export.content), flags), (said, flags)
            if Info.NAME in wanted:
                assert told.pop(Info.NAME) == export.name.encode()
            least, preferred, most = struct.unpack(">III", told.pop(Info.BLOCK_SIZE))
            assert least.bit_count() == preferred.bit_count() == 1
            assert least <= 64 << 10
            assert max(least, 512) <= preferred <= most
            if export.description and Info.DESCRIPTION in {*wanted, *told}:
                assert told.pop(Info.DESCRIPTION) == export.description.encode()
            assert not told

        return Answer(code, frozenset({Rep.ACK}), then, check)

    def _meta(self, code: Option, data: bytes) -> Answer:
        setting = code == Option.SET_META_CONTEXT
        too_big = [Rep.ERR_TOO_BIG] * (len(data) > MAX_META)
        if setting and self.mode is Mode.SIMPLE:
            raise _Invalid(Rep.ERR_INVALID, *too_big)
        try:
            name, queries = _queries(data)
            export = self._find(name)
        except _Invalid as invalid:
            raise _Invalid(*invalid.replies, *too_big) from None
        expected = {each for each in export.contexts if _asks(queries, each, setting=setting)}
        if setting and not too_big:
            self._selected = export, expected

        def check(payloads: Sequence[tuple[int, bytes]]) -> None:
            assert {kind for kind, _ in payloads} <= {Rep.META_CONTEXT}
            ids = [int.from_bytes(payload[:4]) for _, payload in payloads]
            names = [payload[4:].decode() for _, payload in payloads]
            assert sorted(names) == sorted(expected), (names, expected)
            if setting:
                assert len(set(ids)) == len(ids)
                self._ids = dict(zip(ids, names, strict=True))
            else:
                assert not any(ids)

        return Answer(code, frozenset({Rep.ACK, *too_big}), check=check)

    _ANSWERS: ClassVar = {
        Option.STARTTLS: _starttls,
        Option.STRUCTURED_REPLY: _headers,
        Option.EXTENDED_HEADERS: _headers,
        Option.LIST: _list,
        Option.INFO: _info,
        Option.GO: _info,
        Option.LIST_META_CONTEXT: _meta,
        Option.SET_META_CONTEXT: _meta,
    }


def _asks(queries: Sequence[bytes], context: str, *, setting: bool) -> bool:
    """Whether queries name a context; a listing has wildcards, and without queries everything."""
    raw = context.encode()
    if setting:
        return raw in queries
    namespace = raw[: raw.index(b":") + 1]
    wildcards = [namespace]
    if raw.startswith(b"qemu:dirty-bitmap:"):
        wildcards.append(b"qemu:dirty-bitmap:")
    return not queries or any(query in queries for query in (raw, *wildcards))
