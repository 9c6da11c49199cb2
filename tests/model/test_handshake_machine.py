"""A client that sends anything in any order, and the server's negotiation, held against a model.

Every option is valid, nearly valid or garbage, and comes in random segments; several may come at
once. Where the server does TLS, it begins wherever STARTTLS succeeds; what came with that in clear
breaks it. After GO and EXPORT_NAME a few requests show that the session is the one negotiated.
"""

from __future__ import annotations

import atexit
import ssl
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from interop.certificates import Pki
from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Bitmap, Data, Image
from pynbd.server.disk import Disk, DiskNode, StatusMethod
from pynbd.server.export import Export, ExportTable
from pynbd.server.offers import offered_contexts
from pynbd.server.tls import Tls
from tests.conformance.answers import check_error
from tests.conformance.client import (
    Cmd,
    CmdFlag,
    Disconnected,
    Errno,
    Flag,
    Mode,
    Option,
    Peer,
    Rep,
    client_flags,
    filter_payload,
    info_data,
    meta_data,
    option,
)
from tests.conformance.server import pattern
from tests.conformance.tls import TlsPeer, trusting
from tests.model.conversation import cut
from tests.model.loops import LoopThread, descriptors, failed, profile, unhurried
from tests.model.negotiation import MAX_OPTION, Answer, Known, Negotiation, Then

_READING = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.CAN_MULTI_CONN
_READ_ONLY = _READING | Flag.READ_ONLY
_WRITABLE = _READING | Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
_ALLOCATION, _DEPTH = "base:allocation", "qemu:allocation-depth"
_BITMAPS = ["plain", "with:colons:", "größe"]
_SIZE = 64 << 10

EXPORTS = [
    Known(
        "disk",
        "",
        _READ_ONLY | Flag.SEND_CACHE,
        [_ALLOCATION, _DEPTH, *(f"qemu:dirty-bitmap:{name}" for name in _BITMAPS)],
        pattern(0, _SIZE),
    ),
    Known(
        "größe 名前",
        "a description – with “UTF-8”",
        _WRITABLE | Flag.SEND_CACHE,
        [_ALLOCATION, _DEPTH],
        pattern(0, 1000),
    ),
    Known("twin", "", _WRITABLE | Flag.SEND_CACHE, [_ALLOCATION, _DEPTH], pattern(0, 1000)),
    Known("empty", "nothing", _WRITABLE | Flag.SEND_CACHE, [_ALLOCATION, _DEPTH], b""),
    Known("python", "", _READ_ONLY, [_ALLOCATION, "x-heat:reads"], pattern(0, 4096)),
]
"""The first one is the default export."""


class _InPython(Disk):
    size = 4096

    async def pread(self, offset: int, length: int) -> bytes:
        return pattern(offset, length)

    async def _heat(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(length, 7)]

    def contexts(self) -> dict[str, StatusMethod]:
        return {"x-heat:reads": self._heat}


async def _nodes(folder: Path) -> list[BlockNode]:
    """What the `EXPORTS` are of."""
    Image(
        size=_SIZE,
        clusters={0: Data(pattern(0, _SIZE))},
        bitmaps=[Bitmap(name, dirty=[(0, _SIZE)]) for name in _BITMAPS],
    ).write(folder / "disk.qcow2")
    (folder / "odd.raw").write_bytes(pattern(0, 1000))
    (folder / "empty.raw").write_bytes(b"")
    odd = await open_image(folder / "odd.raw", format="raw", read_only=False)
    return [
        await open_image(folder / "disk.qcow2", format="qcow2"),
        odd,
        odd,
        await open_image(folder / "empty.raw", format="raw", read_only=False),
        DiskNode(_InPython()),
    ]


@cache
def _pki() -> Path:
    """Certificates of a server, and whom a client trusts."""
    folder = TemporaryDirectory(prefix="pynbd-model-")
    atexit.register(folder.cleanup)
    return Pki.make(Path(folder.name)).server


# What is sent -----------------------------------------------------------------------------------

_KNOWN_NAMES = st.sampled_from([export.name.encode() for export in EXPORTS])
_ODD_NAMES = st.sampled_from(
    [b"disk\0", b"\0", b"DISK", b"\xff\xfe", "größe".encode()[:3], b"n" * 4096, b"n" * 4097]
)
_NAMES = st.one_of(*[_KNOWN_NAMES] * 6, *[st.just(b"")] * 2, _ODD_NAMES, st.binary(max_size=12))
_QUERIES = st.sampled_from(
    [context.encode() for context in dict.fromkeys(c for e in EXPORTS for c in e.contexts)]
    + [b"base:", b"qemu:", b"qemu:dirty-bitmap:", b"x-heat:", b"qemu:dirty-bitmap", b"base", b""]
    + [b"BASE:ALLOCATION", b"qemu:allocation-depth:", b"qemu:dirty-bitmap:with:", b"q" * 4097]
)
_SOME_QUERIES = st.lists(_QUERIES, max_size=4) | st.lists(
    _QUERIES | st.binary(max_size=8) | st.just(b"base:\0allocation"), max_size=4
)
_INFO_DATA = st.builds(
    info_data, _NAMES, st.lists(st.sampled_from([0, 1, 2, 3, 3, 4, 77, 65535]), max_size=4)
)
_META_DATA = st.builds(meta_data, _NAMES, _SOME_QUERIES)
_BOUNDARIES = st.sampled_from([0, 1, 2, 3, 4, 5, 16, 4096, 4097, 1 << 31, (1 << 32) - 1])


@st.composite
def _nearly(draw: st.DrawFn, right: st.SearchStrategy[bytes]) -> bytes:
    """Data that may be right, cut short, too long, or with another number in it."""
    data = bytearray(draw(right))
    match draw(st.sampled_from(["right"] * 15 + ["short", "long", "number", "byte"])):
        case "short":
            del data[draw(st.integers(0, len(data))) :]
        case "long":
            data += draw(st.binary(min_size=1, max_size=40) | st.just(option(Option.ABORT)))
        case "number" if len(data) >= 4:
            at = draw(st.integers(0, len(data) - 4) | st.just(0))
            data[at : at + 4] = draw(_BOUNDARIES).to_bytes(4)
        case "byte" if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


_GARBAGE = st.binary(max_size=64)
_EMPTY = st.just(b"") | st.just(b"") | st.just(b"") | _GARBAGE
_DATA = {
    Option.EXPORT_NAME: _NAMES,
    Option.ABORT: _EMPTY,
    Option.LIST: _EMPTY,
    Option.STARTTLS: _EMPTY,
    Option.INFO: _nearly(_INFO_DATA),
    Option.GO: _nearly(_INFO_DATA),
    Option.STRUCTURED_REPLY: _EMPTY,
    Option.EXTENDED_HEADERS: _EMPTY,
    Option.LIST_META_CONTEXT: _nearly(_META_DATA),
    Option.SET_META_CONTEXT: _nearly(_META_DATA),
}
_OFTEN = [Option.INFO, Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT] * 4 + [
    *[Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS] * 2,
    Option.GO,
    Option.LIST,
    Option.STARTTLS,
]
_HEADERS = [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]
_UNKNOWN = st.sampled_from([0, 4, 12, 99, 1 << 31, (1 << 32) - 1])


@st.composite
def _options(draw: st.DrawFn) -> bytes:
    """An option; seldom one with the data of another."""
    code = draw(st.sampled_from(_OFTEN))
    data = draw(_DATA[code])
    match draw(st.sampled_from(["as it is"] * 12 + ["unknown", "other data", "32 MiB + 1"])):
        case "unknown":
            return option(draw(_UNKNOWN), data)
        case "other data":
            return option(draw(st.sampled_from(_OFTEN)), data)
        case "32 MiB + 1" if draw(st.booleans()):
            return option(code, data, length=MAX_OPTION + 1)
    return option(code, data)


_FAILING_SET = option(Option.SET_META_CONTEXT, meta_data("nosuch"))
_LAST = (
    _nearly(_NAMES).map(lambda name: option(Option.EXPORT_NAME, name))
    | _EMPTY.map(lambda data: option(Option.ABORT, data))
    | _nearly(_INFO_DATA).map(lambda data: option(Option.GO, data))
)
# Anywhere, or after each of the first bytes.
_CUTS = st.lists(st.integers(0, 1 << 16), max_size=4) | st.just(range(1, 40))


class Handshake(RuleBasedStateMachine):
    """One server; one client after the other."""

    peer: TlsPeer | None = None
    model: Negotiation

    @initialize(
        loop=st.sampled_from(["asyncio", "uvloop"]),
        structured=st.sampled_from([True, True, True, False]),
        extended=st.sampled_from([True, True, True, False]),
        flags=st.sampled_from([3, 3, 1]),
        tls=st.sampled_from(["NOTLS", "SELECTIVETLS", "FORCEDTLS"]),
    )
    def start(self, loop: str, structured: bool, extended: bool, flags: int, tls: str) -> None:
        pki = _pki()
        self.before = descriptors()
        self.flags = flags
        self.folder = TemporaryDirectory(prefix="pynbd-model-")
        self.thread = LoopThread(loop)
        self.nodes = self.thread.run(_nodes(Path(self.folder.name)))
        self.exports = ExportTable(
            Export(known.name, node, description=known.description, contexts=offered_contexts(node))
            for known, node in zip(EXPORTS, self.nodes, strict=True)
        )
        self.path = f"{self.folder.name}/socket"
        self.server = self.thread.serve(
            self.exports,
            self.path,
            tls=None if tls == "NOTLS" else Tls(certificates=pki, required=tls == "FORCEDTLS"),
            structured=structured,
            extended=extended,
        )
        self.tls, self.context = tls, trusting(pki)
        self.idle = descriptors()
        refused = {Option.STRUCTURED_REPLY: structured, Option.EXTENDED_HEADERS: extended}
        self.refused = frozenset(int(code) for code, offered in refused.items() if not offered)

    def teardown(self) -> None:
        if failed() or not hasattr(self, "refused"):
            return
        self._connect(self.flags)
        self._send(option(Option.GO, info_data("")), [])
        self._leave()
        self.thread.loop.call_soon_threadsafe(self.server.stop)
        self.thread.ended()
        for node in dict.fromkeys(self.nodes):
            self.thread.run(node.close())
        self.thread.close()
        self.folder.cleanup()
        assert not descriptors() - self.before

    # Coming and going

    def _connect(self, flags: int, cuts: Sequence[int] = ()) -> None:
        self._leave()
        self.peer = TlsPeer(self.path)
        self.model = Negotiation(EXPORTS, self.refused, self.tls)
        assert self.peer.read_greeting() == 3
        self._send(client_flags(flags), cuts)

    def _leave(self) -> None:
        """Whatever the client did, the server's end is over after it, and had no defect."""
        if self.peer is not None:
            self.peer.sock.close()
            self.thread.settle()
            self.peer = None
            assert not descriptors() - self.idle

    @rule(
        flags=st.sampled_from([3, 3, 3, 1, 1, 1, 0, 2, 4, 7, 1 << 31]),
        cuts=_CUTS,
    )
    def connect(self, flags: int, cuts: Sequence[int]) -> None:
        self._connect(flags, cuts)

    @precondition(lambda self: self.tls != "NOTLS")
    @rule(before=st.lists(st.sampled_from([*_HEADERS, Option.LIST]), max_size=2), cuts=_CUTS)
    def start_tls(self, before: Sequence[Option], cuts: Sequence[int]) -> None:
        """A client that has just come, or another one."""
        if self.peer is None or self.model.missing:
            self._connect(self.flags)
        self._send(b"".join(map(option, [*before, Option.STARTTLS])), cuts)

    @rule(part=_options(), keep=st.integers(0, 15))
    def leave_in_the_middle(self, part: bytes, keep: int) -> None:
        self._send(part[:keep], [])
        self._leave()

    # Options

    @rule(options=st.lists(_options(), min_size=1, max_size=4), cuts=_CUTS)
    def ask(self, options: Sequence[bytes], cuts: Sequence[int]) -> None:
        self._send(b"".join(options), cuts)

    @rule(
        headers=st.lists(
            st.sampled_from([*_HEADERS, *_HEADERS, Option.LIST]), min_size=1, max_size=2
        ),
        export=st.sampled_from(EXPORTS),
        wanted=st.sets(st.integers(0, 4), min_size=1),
        upgraded=st.booleans(),
        between=st.sampled_from([None, _FAILING_SET, _FAILING_SET]) | _options(),
        other=st.one_of(*[st.none()] * 4, _NAMES),
        last=st.sampled_from([*[Option.GO] * 5, Option.INFO, Option.EXPORT_NAME]),
    )
    def negotiate(
        self,
        headers: Sequence[Option],
        export: Known,
        wanted: set[int],
        upgraded: bool,
        between: bytes | None,
        other: bytes | None,
        last: Option,
    ) -> None:
        """As correct clients do it, one option after the other, whatever came before. The contexts
        may be of one export, and the session on another.
        """
        queries = [name for at, name in enumerate(export.contexts) if at in wanted]
        options = [option(code) for code in headers]
        options.append(option(Option.SET_META_CONTEXT, meta_data(export.name, queries)))
        if upgraded:
            options.append(option(Option.EXTENDED_HEADERS))
        if between:
            options.append(between)
        name = export.name.encode() if other is None else other
        options.append(option(last, name if last == Option.EXPORT_NAME else info_data(name, [1])))
        self._send(bytes(self.model.missing if self.peer else 0), [])
        for each in options:
            self._send(each, [])

    @rule(first=_options(), last=_LAST, rest=st.lists(_options(), max_size=2), cuts=_CUTS)
    def end(self, first: bytes, last: bytes, rest: Sequence[bytes], cuts: Sequence[int]) -> None:
        self._send(first + last + b"".join(rest), cuts)

    @rule(options=st.lists(_options() | _LAST, min_size=1, max_size=2))
    def ask_one_that_ends(self, options: Sequence[bytes]) -> None:
        """The server is about to end meanwhile."""
        self._send(b"", [])
        self.exports.stopping = self.model.stopping = True
        self._send(b"".join(options), [])
        self.exports.stopping = self.model.stopping = False

    @rule(
        garbage=st.binary(min_size=1, max_size=64),
        length=st.none() | st.integers(0, 1 << 16),
        code=st.sampled_from([0, 1, 3, 6, 7, 9, 10]),
    )
    def confuse(self, garbage: bytes, length: int | None, code: int) -> None:
        """No option at all, or the beginning of one; what comes next may be the rest of it."""
        self._send(garbage if length is None else option(code, garbage, length=length), [])

    @precondition(lambda self: self.peer is not None and self.model.missing)
    @rule(cuts=_CUTS)
    def bring_what_is_missing(self, cuts: Sequence[int]) -> None:
        self._send(bytes(self.model.missing), cuts)

    def _send(self, data: bytes, cuts: Sequence[int]) -> None:
        """In segments, each only once the one before was taken; then all answers are read."""
        if self.peer is None:
            self._connect(self.flags)
        peer = self.peer
        assert peer
        cut(peer, data, cuts)
        for answer in self.model.take(data):
            self._judge(peer, answer)
        if self.peer and not self.model.missing:
            peer.sock.setblocking(False)
            try:
                extra = peer.sock.recv(1)
            except (BlockingIOError, ssl.SSLWantReadError):
                extra = None
            peer.sock.settimeout(10)
            assert extra is None, "the server closed, or said more than it was asked"

    def _judge(self, peer: TlsPeer, answer: Answer) -> None:
        if answer.raw:
            assert peer.read(len(answer.raw)) == answer.raw
        if answer.replies:
            *before, last = peer.read_option_replies(answer.option)
            assert last.type in answer.replies, (last, answer)
            if last.type == Rep.ACK:
                assert not last.data
                answer.check([(reply.type, reply.data) for reply in before])
            else:
                assert not before
                check_error(last)
        if answer.then is Then.TLS:
            self._shake_hands(peer)
            return
        if answer.then is Then.TRANSMISSION:
            self._transmit(peer)
        if answer.then is not Then.GOES_ON:
            peer.expect_disconnect()
            self._leave()

    def _shake_hands(self, peer: TlsPeer) -> None:
        """Unless something came in clear behind STARTTLS: that is no handshake, nor anything."""
        if not self.model.lost:
            peer.shake_hands(self.context)
            return
        with suppress(Disconnected):
            peer.finish()
        said = peer.read_to_end()
        assert said[:2] in (b"", b"\x15\3"), said
        assert len(said) in (0, 7), said
        self._leave()

    # Transmission

    def _transmit(self, peer: Peer) -> None:
        """What was negotiated is what is spoken; then the client leaves. If there is more of the
        client's on its way, it is no request: the server closes without a word.
        """
        model = self.model
        assert model.export
        if model.lost:
            peer.finish()
            return
        peer.mode = model.mode
        content, contexts = model.export.content, model.contexts
        reply = peer.ask(Cmd.READ, 0, len(content))
        assert (reply.error, reply.data) == (0, content)
        flags = CmdFlag.DF
        reply = peer.ask(Cmd.READ, 0, len(content), flags=flags)
        assert reply.error == (Errno.EINVAL if model.mode is Mode.SIMPLE else 0)
        if content:
            reply = peer.ask(Cmd.BLOCK_STATUS, 0, len(content))
            assert reply.error == (0 if contexts else Errno.EINVAL)
            assert set(reply.status) == set(contexts)
            if model.mode is Mode.EXTENDED:
                payload = filter_payload(len(content), list(contexts)[:1])
                reply = peer.ask(Cmd.BLOCK_STATUS, flags=CmdFlag.PAYLOAD_LEN, payload=payload)
                assert reply.error == (0 if contexts else Errno.EINVAL)
                assert list(reply.status) == list(contexts)[:1]
        peer.request(Cmd.DISC)


TestHandshake = unhurried(Handshake.TestCase)
TestHandshake.settings = profile(examples=100, steps=25)
