"""Malformed requests: rows C, B, W, X and P.

Where the connection lives on, the malformed request has the cookie `BAD`, and after it comes one
with the cookie `GOOD` that is served: what is answered to it shows that the two are in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.conformance.client import (
    COMPACT_REQUEST_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    Cmd,
    CmdFlag,
    Mode,
    filter_payload,
    opening,
    request,
)
from tests.conformance.malformed import Stimulus
from tests.conformance.server import CHAIN_SIZE, RAW_SCRATCH, RAW_SIZE, RO_SIZE

BAD, GOOD = 0xBAD, 0x900D

_BASE = "base:allocation"
_PAYLOAD_LEN = CmdFlag.PAYLOAD_LEN
_SCRATCH = RAW_SCRATCH[0]
_DATA = b"\xaa" * 16
# The ids of the filters' contexts, which are asked for in this order.
_FILTERED = (_BASE, "qemu:allocation-depth", "qemu:dirty-bitmap:plain")


def _answered(
    row: str,
    name: str,
    mode: Mode,
    command: int,
    offset: int = 0,
    length: int | None = None,
    *,
    flags: int = 0,
    payload: bytes = b"",
    export: str = "",
    contexts: Sequence[str] = (),
) -> Stimulus:
    """A request that is refused; the connection lives on."""
    length = len(payload) if length is None else length
    bad = request(mode, command, offset, length, flags=flags, cookie=BAD, payload=payload)
    good = request(mode, Cmd.CACHE, 0, 512, cookie=GOOD)
    return Stimulus(row, f"{name}, {mode.value}", opening(mode, export, contexts), bad + good)


def _disconnected(
    row: str, name: str, mode: Mode, data: bytes, *, contexts: Sequence[str] = ()
) -> Stimulus:
    """A request after which there is no going on."""
    return Stimulus(row, f"{name}, {mode.value}", opening(mode, "", contexts), data)


def _filter(row: str, name: str, payload: bytes, offset: int = 0, flags: int = 0) -> Stimulus:
    return _answered(
        row,
        name,
        Mode.EXTENDED,
        Cmd.BLOCK_STATUS,
        offset,
        flags=flags | _PAYLOAD_LEN,
        payload=payload,
        export="qcow2",
        contexts=_FILTERED,
    )


def _in_every_mode() -> Iterator[Stimulus]:
    for mode in Mode:
        extended = mode is Mode.EXTENDED
        write = _PAYLOAD_LEN if extended else 0
        contexts = () if mode is Mode.SIMPLE else (_BASE,)
        other = COMPACT_REQUEST_MAGIC if extended else EXTENDED_REQUEST_MAGIC
        read = request(mode, Cmd.READ, 0, 512)
        yield _disconnected("C1", "wrong magic", mode, b"\0\0\0\0" + read[4:])
        yield _disconnected("C2", "the other magic", mode, other.to_bytes(4) + read[4:])
        yield _answered("C3", "unknown command", mode, 99, 0, 512)
        garbage = request(mode, Cmd.DISC, 2**64 - 1, 2**32 - 1, flags=0xFFFF)
        yield _disconnected("C5", "DISC with garbage", mode, garbage)
        yield _answered("C6", "FLUSH with an offset", mode, Cmd.FLUSH, 512, 0)
        yield _answered("C6", "FLUSH with a length", mode, Cmd.FLUSH, 0, 512)
        yield _answered("C10", "READ with REQ_ONE", mode, Cmd.READ, 0, 512, flags=CmdFlag.REQ_ONE)
        yield _answered("B1", "READ past the end", mode, Cmd.READ, RAW_SIZE, 512)
        yield _answered(
            "B2", "WRITE past the end", mode, Cmd.WRITE, RAW_SIZE, flags=write, payload=_DATA
        )
        yield _answered("B3", "zeroes past the end", mode, Cmd.WRITE_ZEROES, RAW_SIZE, 512)
        yield _answered("B4", "TRIM past the end", mode, Cmd.TRIM, RAW_SIZE, 512)
        yield _answered("B5", "CACHE past the end", mode, Cmd.CACHE, RAW_SIZE, 512)
        yield _answered(
            "B6", "status past the end", mode, Cmd.BLOCK_STATUS, RAW_SIZE, 512, contexts=contexts
        )
        yield _answered(
            "B7",
            "WRITE across the end",
            mode,
            Cmd.WRITE,
            RAW_SIZE - 8,
            flags=write,
            payload=_DATA,
        )
        yield _answered("B8", "READ across 2^64", mode, Cmd.READ, 2**64 - 256, 512)
        yield _answered("B8", "zeroes across 2^64", mode, Cmd.WRITE_ZEROES, 2**64 - 1, 2**32 - 1)
        yield _answered("B13", "status of nothing", mode, Cmd.BLOCK_STATUS, 0, 0, contexts=contexts)
        yield _answered("B14", "nothing past the end", mode, Cmd.READ, RAW_SIZE + 1, 0)
        yield _answered("B15", "READ of 32 MiB + 1", mode, Cmd.READ, 0, MAX_PAYLOAD + 1)
        yield _answered("B16", "READ of 4 GiB - 1", mode, Cmd.READ, 0, 2**32 - 1)
        too_long = request(mode, Cmd.WRITE, _SCRATCH, MAX_PAYLOAD + 1, flags=write)
        yield _disconnected("B18", "WRITE of 32 MiB + 1", mode, too_long + _DATA)
        yield _answered(
            "W1", "WRITE to read-only", mode, Cmd.WRITE, flags=write, payload=_DATA, export="ro"
        )
        yield _answered("W2", "TRIM of read-only", mode, Cmd.TRIM, 0, 512, export="ro")
        yield _answered("W3", "zeroes to read-only", mode, Cmd.WRITE_ZEROES, 0, 512, export="ro")
        yield _answered(
            "W4",
            "WRITE past the end of read-only",
            mode,
            Cmd.WRITE,
            RO_SIZE,
            flags=write,
            payload=_DATA,
            export="ro",
        )
        yield _answered("X1", "status without contexts", mode, Cmd.BLOCK_STATUS, 0, 512)
        if not extended:
            yield _answered("P21", "READ", mode, Cmd.READ, 0, 512, flags=_PAYLOAD_LEN)
            yield _answered(
                "P21", "WRITE", mode, Cmd.WRITE, _SCRATCH, flags=_PAYLOAD_LEN, payload=_DATA
            )


def _with_payloads() -> Iterator[Stimulus]:
    mode = Mode.EXTENDED
    yield _answered("B16", "READ of 2^64 - 1", mode, Cmd.READ, 0, 2**64 - 1)
    for command in (Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.FLUSH, 99):
        name = command.name if isinstance(command, Cmd) else "unknown command"
        yield _answered("P16", name, mode, command, flags=_PAYLOAD_LEN, payload=_DATA)
        yield _answered("P18", name, mode, command, flags=_PAYLOAD_LEN)
    long = b"\xa5" * 300_000
    yield _answered("P16", "long payload", mode, Cmd.READ, flags=_PAYLOAD_LEN, payload=long)
    for row, command, length in [
        ("P8", Cmd.BLOCK_STATUS, MAX_PAYLOAD + 1),
        ("P17", Cmd.READ, MAX_PAYLOAD + 1),
        ("P17", 99, 2**64 - 1),
        ("P20", Cmd.WRITE, 1 << 63),
    ]:
        header = request(mode, command, 0, length, flags=_PAYLOAD_LEN)
        yield _disconnected(row, f"payload of {length}", mode, header + _DATA, contexts=(_BASE,))


def _filters() -> Iterator[Stimulus]:
    yield _filter("P2", "an id twice", filter_payload(512, [0, 1, 0]))
    yield _filter("P3", "unknown id", filter_payload(512, [0, 9]))
    yield _filter("P3", "greatest id", filter_payload(512, [0xFFFFFFFF]))
    yield _filter("P4", "no ids", filter_payload(512, []))
    for length in (0, 4, 9, 14):
        yield _filter("P5", f"{length} bytes", filter_payload(512, [0, 1])[:length])
    yield _filter("P6", "four ids", filter_payload(512, [0, 1, 2, 3]))
    yield _filter("P6", "100 ids", filter_payload(512, range(100)))
    yield _filter("P7", "garbage", b"\xa5" * 300_000)
    yield _filter("P9", "effect of nothing", filter_payload(0, [0]))
    yield _filter("P10", "effect past the end", filter_payload(CHAIN_SIZE + 1, [0]))
    yield _filter("P10", "effect across 2^64", filter_payload(2**64 - 1, [0]), 1)
    yield _filter("P13", "with DF", filter_payload(512, [0]), flags=CmdFlag.DF)
    yield _answered(
        "P14",
        "no SET",
        Mode.EXTENDED,
        Cmd.BLOCK_STATUS,
        flags=_PAYLOAD_LEN,
        payload=filter_payload(512, [0]),
    )
    yield _answered(
        "P15",
        "SET matched nothing",
        Mode.EXTENDED,
        Cmd.BLOCK_STATUS,
        flags=_PAYLOAD_LEN,
        payload=filter_payload(512, [0]),
        contexts=("base:nosuch",),
    )


STIMULI = [*_in_every_mode(), *_with_payloads(), *_filters()]
