"""P: payloads where extended headers allow them, and the payload that filters BLOCK_STATUS."""

from __future__ import annotations

import itertools

import pytest

from tests.conformance.asking import (
    in_little_memory,
    is_refusal,
    refused,
    still_serves,
    succeeded,
)
from tests.conformance.client import (
    MAX_PAYLOAD,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
    Mode,
    Option,
    Peer,
    filter_payload,
    request,
)
from tests.conformance.malformed import Stimulus, of_row
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import CHAIN_CONTEXTS, CHAIN_SIZE, CLUSTER, RAW_SCRATCH, RAW_SIZE
from tests.conformance.stimuli_transmission import STIMULI
from tests.conformance.test_x_block_status import expected

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
PLAIN = "qemu:dirty-bitmap:plain"
CONTEXTS = (BASE, DEPTH, PLAIN)
SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.permutations(CONTEXTS, count)]
EFFECT = 4 * CLUSTER
SCRATCH = RAW_SCRATCH[0] + (512 << 20)
WITHOUT_PAYLOAD = (Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.FLUSH, 8, 99)
without_payload = pytest.mark.parametrize("command", WITHOUT_PAYLOAD, ids=str)


class Filtering:
    """A connection to ``qcow2`` with three contexts, and their ids by name."""

    def __init__(self, server: RunningServer) -> None:
        self.peer = server.connect()
        self.ids = self.peer.negotiate(Mode.EXTENDED, "qcow2", CONTEXTS)

    def __enter__(self) -> Filtering:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.sock.close()

    def refused(self, payload: bytes, offset: int = 0, flags: int = 0) -> None:
        """EINVAL; then a filter that is right is served."""
        flags |= CmdFlag.PAYLOAD_LEN
        cookie = self.peer.request(Cmd.BLOCK_STATUS, offset, flags=flags, payload=payload)
        reply = self.peer.reply()
        assert reply.cookie == cookie
        is_refusal(Mode.EXTENDED, reply, Errno.EINVAL, offset)
        self.serves()

    def serves(self) -> None:
        number = self.ids[BASE]
        status = self.filtered(filter_payload(EFFECT, [number]))
        assert status == {number: expected(BASE, 0, EFFECT)}

    def filtered(
        self, payload: bytes, offset: int = 0, flags: int = 0
    ) -> dict[int, list[tuple[int, int]]]:
        flags |= CmdFlag.PAYLOAD_LEN
        reply = succeeded(self.peer, Cmd.BLOCK_STATUS, offset, flags=flags, payload=payload)
        assert len(reply.chunks) == len(reply.status)  # one for each context
        return {number: list(extents) for number, extents in reply.status.items()}


# The filter -----------------------------------------------------------------------------------


@row("P1")
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_subset_in_any_order(server: RunningServer, subset: tuple[str, ...]) -> None:
    with Filtering(server) as filtering:
        payload = filter_payload(EFFECT, [filtering.ids[name] for name in subset])
        for offset in (0, CLUSTER + 512):
            status = filtering.filtered(payload, offset)
            assert status == {
                filtering.ids[name]: expected(name, offset, EFFECT) for name in subset
            }
            status = filtering.filtered(payload, offset, CmdFlag.REQ_ONE)
            assert status == {
                filtering.ids[name]: expected(name, offset, EFFECT)[:1] for name in subset
            }
        filtering.serves()


@row("P1")
def test_without_a_filter_all_are_answered(server: RunningServer) -> None:
    with Filtering(server) as filtering:
        status = succeeded(filtering.peer, Cmd.BLOCK_STATUS, 0, EFFECT).status
        assert status == {n: expected(name, 0, EFFECT) for name, n in filtering.ids.items()}
        filtering.serves()


@row("P2")
@pytest.mark.parametrize("places", [(0, 0), (0, 1, 0), (1, 1, 0), (2, 2, 2)], ids=str)
def test_duplicate_id(server: RunningServer, places: tuple[int, ...]) -> None:
    with Filtering(server) as filtering:
        numbers = list(filtering.ids.values())
        filtering.refused(filter_payload(EFFECT, [numbers[at] for at in places]))


@row("P3")
@pytest.mark.parametrize("unknown", [9, 1000, 1 << 31, 0xFFFFFFFF])
def test_unknown_id(server: RunningServer, unknown: int) -> None:
    with Filtering(server) as filtering:
        known = filtering.ids[BASE]
        filtering.refused(filter_payload(EFFECT, [unknown]))
        filtering.refused(filter_payload(EFFECT, [known, unknown]))
        filtering.refused(filter_payload(EFFECT, [unknown, known]))


@row("P3")
def test_id_that_exists_and_was_not_negotiated(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.EXTENDED)
        every = peer.meta(Option.SET_META_CONTEXT, "qcow2", CHAIN_CONTEXTS)
    with Filtering(server) as filtering:
        strangers = set(every.values()) - set(filtering.ids.values())
        assert strangers
        for number in strangers:
            filtering.refused(filter_payload(EFFECT, [number]))


@row("P4")
def test_empty_list(server: RunningServer) -> None:
    with Filtering(server) as filtering:
        filtering.refused(filter_payload(EFFECT, []))


@row("P5")
@pytest.mark.parametrize("length", [0, 1, 4, 7, 9, 10, 11, 13, 14, 15, 19])
def test_payload_that_is_not_8_and_4_times_n(server: RunningServer, length: int) -> None:
    with Filtering(server) as filtering:
        filtering.refused(filter_payload(EFFECT, [filtering.ids[BASE]] * 3)[:length])


@row("P6")
@pytest.mark.parametrize("count", [4, 5, 100, 10_000])
def test_more_ids_than_contexts(server: RunningServer, count: int) -> None:
    with Filtering(server) as filtering:
        filtering.refused(filter_payload(EFFECT, range(count)))


@row("P7")
@pytest.mark.parametrize("length", [1 << 20, MAX_PAYLOAD])
def test_garbage(server: RunningServer, length: int) -> None:
    """Drained, and never held in memory."""
    with Filtering(server) as filtering, in_little_memory(server):
        filtering.refused(b"\xa5" * length)


@row("P8")
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 1 << 32, 1 << 63, 2**64 - 1], ids=hex)
def test_filter_longer_than_the_maximum(server: RunningServer, length: int) -> None:
    with Filtering(server) as filtering:
        peer = filtering.peer
        peer.request(Cmd.BLOCK_STATUS, 0, length, flags=CmdFlag.PAYLOAD_LEN)
        peer.expect_disconnect()


@row("P9")
@pytest.mark.parametrize("offset", [0, CHAIN_SIZE])
def test_effect_of_nothing(server: RunningServer, offset: int) -> None:
    with Filtering(server) as filtering:
        filtering.refused(filter_payload(0, [filtering.ids[BASE]]), offset)


@row("P10")
@pytest.mark.parametrize(
    "offset, effect",
    [
        (0, CHAIN_SIZE + 1),
        (1, CHAIN_SIZE),
        (CHAIN_SIZE, 1),
        (0, 2**64 - 1),
        (1, 2**64 - 1),
        (2**64 - 1, 1),
        (2**64 - 1, 2**64 - 1),
        (1 << 63, 1 << 63),
    ],
)
def test_effect_beyond_the_end(server: RunningServer, offset: int, effect: int) -> None:
    with Filtering(server) as filtering:
        filtering.refused(filter_payload(effect, [filtering.ids[BASE]]), offset)


@row("P11")
def test_the_effect_is_not_the_payload(server: RunningServer) -> None:
    """One byte at the end of the export, asked for with a payload of 20."""
    with Filtering(server) as filtering:
        payload = filter_payload(1, list(filtering.ids.values()))
        last = CHAIN_SIZE - 1
        status = filtering.filtered(payload, last)
        assert status == {n: expected(name, last, 1) for name, n in filtering.ids.items()}
        filtering.serves()


@row("P12")
@pytest.mark.parametrize("effect", [(1 << 32) + 1, RAW_SIZE])
def test_effect_of_more_than_32_bits(server: RunningServer, effect: int) -> None:
    with server.connect() as peer:
        ids = peer.negotiate(Mode.EXTENDED, "", [BASE, DEPTH])
        payload = filter_payload(effect, [ids[DEPTH]])
        flags = CmdFlag.PAYLOAD_LEN
        status = succeeded(peer, Cmd.BLOCK_STATUS, 0, flags=flags, payload=payload).status
        ((extent,),) = status.values()
        assert extent == (effect, 1)
        still_serves(peer)


@row("P13")
@pytest.mark.parametrize(
    "flags", [CmdFlag.DF, CmdFlag.NO_HOLE, CmdFlag.FAST_ZERO, 0x40, 0x8000], ids=str
)
def test_filter_with_an_illegal_flag(server: RunningServer, flags: int) -> None:
    with Filtering(server) as filtering:
        filtering.refused(filter_payload(EFFECT, [filtering.ids[BASE]]), flags=flags)


def prepare(peer: Peer, how: str) -> None:
    """Enter transmission with extended headers and without a context, in one of the ways there
    are.
    """
    peer.greet()
    peer.headers(Mode.EXTENDED)
    if how == "SET failed":
        peer.meta(Option.SET_META_CONTEXT, "", [BASE])
        peer.refused(Option.SET_META_CONTEXT, b"\0\0\0")
    elif how == "SET for another export":
        assert peer.meta(Option.SET_META_CONTEXT, "qcow2", [BASE])
    elif how == "SET matched nothing":
        assert peer.meta(Option.SET_META_CONTEXT, "", ["base:nosuch"]) == {}
    elif how == "SET without queries":
        peer.meta(Option.SET_META_CONTEXT, "", [BASE])
        assert peer.meta(Option.SET_META_CONTEXT, "", []) == {}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("no SET", marks=row("P14", "P22")),
        pytest.param("SET failed", marks=row("P14", "P22")),
        pytest.param("SET for another export", marks=row("P14", "P22")),
        pytest.param("SET matched nothing", marks=row("P15", "P22")),
        pytest.param("SET without queries", marks=row("P15", "P22")),
    ],
)
@pytest.mark.parametrize("numbers", [[], [0], [0, 1], list(range(1000))], ids=len)
def test_filter_without_contexts(server: RunningServer, how: str, numbers: list[int]) -> None:
    """The server did not advertise the filter then; what comes is drained."""
    with server.connect() as peer:
        prepare(peer, how)
        assert not peer.info(Option.GO).flags & Flag.BLOCK_STATUS_PAYLOAD
        flags = CmdFlag.PAYLOAD_LEN
        payload = filter_payload(4096, numbers)
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, payload=payload, flags=flags)
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, 0, 4096)


# Payloads where there is none -----------------------------------------------------------------


@row("P16")
@without_payload
@pytest.mark.parametrize("length", [1, 12, 512, 200_000, 1 << 20])
def test_payload_is_drained(server: RunningServer, command: int, length: int) -> None:
    with server.enter(Mode.EXTENDED) as peer:
        flags = CmdFlag.PAYLOAD_LEN
        # What looks like a request inside the payload is none.
        inside = request(Mode.EXTENDED, Cmd.READ, 0, 512, cookie=666)
        payload = (inside * (length // len(inside) + 1))[:length]
        refused(peer, Errno.EINVAL, command, payload=payload, flags=flags)


@row("P16")
@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES])
@pytest.mark.parametrize("length", [0, 12, 200_000])
def test_payload_on_a_read_only_export(server: RunningServer, command: Cmd, length: int) -> None:
    """That it may not write is said first."""
    with server.enter(Mode.EXTENDED, "ro") as peer:
        flags = CmdFlag.PAYLOAD_LEN
        refused(peer, Errno.EPERM, command, payload=bytes(length), flags=flags)


@row("P16")
@without_payload
def test_longest_payload_is_drained(server: RunningServer, command: int) -> None:
    with server.enter(Mode.EXTENDED) as peer, in_little_memory(server):
        refused(peer, Errno.EINVAL, command, payload=bytes(MAX_PAYLOAD), flags=CmdFlag.PAYLOAD_LEN)


@row("P17")
@without_payload
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 1 << 63, 2**64 - 1], ids=hex)
def test_payload_too_long_to_drain(server: RunningServer, command: int, length: int) -> None:
    with server.enter(Mode.EXTENDED) as peer:
        peer.request(command, 0, length, flags=CmdFlag.PAYLOAD_LEN)
        peer.expect_disconnect()


@row("P18")
@without_payload
def test_payload_of_no_bytes(server: RunningServer, command: int) -> None:
    with server.enter(Mode.EXTENDED) as peer:
        refused(peer, Errno.EINVAL, command, 0, 0, flags=CmdFlag.PAYLOAD_LEN)


@row("P19")
@pytest.mark.parametrize("length", [1, 512, 200_000])
def test_write_without_the_flag(server: RunningServer, length: int) -> None:
    """A mistake that clients make: its payload is taken to be there."""
    with server.enter(Mode.EXTENDED) as peer:
        reply = peer.ask(Cmd.WRITE, SCRATCH, payload=b"\xaa" * length)
        assert reply.error == 0
        assert peer.pread(SCRATCH, length + 1) == b"\xaa" * length + b"\0"
        succeeded(peer, Cmd.WRITE_ZEROES, SCRATCH, length)
        still_serves(peer)


@row("P20")
@pytest.mark.parametrize("length", [1 << 63, 2**64 - 1], ids=hex)
@pytest.mark.parametrize("flags", [CmdFlag.PAYLOAD_LEN, 0], ids=["PAYLOAD_LEN", "plain"])
def test_write_of_half_the_address_space(server: RunningServer, length: int, flags: int) -> None:
    with server.enter(Mode.EXTENDED) as peer, in_little_memory(server):
        peer.request(Cmd.WRITE, SCRATCH, length, flags=flags)
        peer.expect_disconnect()


@row("P21")
@pytest.mark.parametrize("mode", [Mode.SIMPLE, Mode.STRUCTURED], ids=lambda mode: mode.value)
@pytest.mark.parametrize("command", [*WITHOUT_PAYLOAD, Cmd.WRITE, Cmd.BLOCK_STATUS], ids=str)
def test_flag_in_a_compact_request(server: RunningServer, mode: Mode, command: int) -> None:
    """Illegal there; and it does not make the length that of a payload, save for a WRITE."""
    payload = bytes(512) if command == Cmd.WRITE else b""
    contexts = () if mode is Mode.SIMPLE else (BASE,)
    with server.enter(mode, contexts=contexts) as peer:
        flags = CmdFlag.PAYLOAD_LEN
        refused(peer, Errno.EINVAL, command, SCRATCH, 512, payload=payload, flags=flags)


# Malformed, as test_malformed.py sends them byte by byte --------------------------------------


@pytest.mark.parametrize(
    "stimulus", of_row(STIMULI, "P2", "P3", "P4", "P5", "P6", "P9", "P10", "P13"), ids=str
)
def test_malformed_filters_are_refused(server: RunningServer, stimulus: Stimulus) -> None:
    """Each is refused with EINVAL, and the request that follows it is served."""
    with server.connect() as peer:
        peer.send(stimulus.setup + stimulus.data)
        peer.finish()
        answer = peer.read_to_end()
        refusal = bytes.fromhex("6e8a278c 0001 8001 0000000000000bad")
        success = bytes.fromhex("6e8a278c 0001 0000 000000000000900d")
        assert answer.count(refusal) == answer.count(success) == 1
