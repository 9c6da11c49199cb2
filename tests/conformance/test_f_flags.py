"""Rows F: the transmission flags, each as EXPORT_NAME, INFO and GO tell them."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Image, poke
from pynbd.errors import ImageError
from tests.conformance.client import Cmd, CmdFlag, Flag, Mode, Option, option
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import ODD_SIZE, RAW_SCRATCH, RAW_SIZE

EXPORTS = ["raw", "ro", "qcow2", "empty", "odd", "single", "broken", "fragments"]
WRITABLE = ["raw", "empty", "odd"]
BASE = ["base:allocation"]


def flags_of(
    server: RunningServer, export: str, mode: Mode = Mode.SIMPLE, contexts: list[str] | None = None
) -> tuple[int, int]:
    """What INFO and then GO say; a FLUSH follows, which all exports have."""
    with server.connect() as peer:
        peer.greet()
        peer.headers(mode)
        if contexts is not None:
            peer.meta(Option.SET_META_CONTEXT, export, contexts)
        told = peer.info(Option.INFO, export).flags, peer.info(Option.GO, export).flags
        assert peer.ask(Cmd.FLUSH).error == 0
    return told


@row("F2", "F3", "F4", "F9", "F10", "F11")
@pytest.mark.parametrize(
    "export, mode, contexts, info, go",
    [
        ("ro", Mode.SIMPLE, None, 0x050F, 0x050F),
        ("ro", Mode.STRUCTURED, None, 0x058F, 0x058F),
        ("ro", Mode.STRUCTURED, BASE, 0x058F, 0x058F),
        ("ro", Mode.EXTENDED, None, 0x158F, 0x058F),
        ("ro", Mode.EXTENDED, ["base:nothing"], 0x158F, 0x058F),
        ("ro", Mode.EXTENDED, BASE, 0x158F, 0x158F),
        ("qcow2", Mode.EXTENDED, BASE, 0x158F, 0x158F),
        ("raw", Mode.SIMPLE, None, 0x0D6D, 0x0D6D),
        ("raw", Mode.STRUCTURED, BASE, 0x0DED, 0x0DED),
        ("raw", Mode.EXTENDED, None, 0x1DED, 0x0DED),
        ("raw", Mode.EXTENDED, BASE, 0x1DED, 0x1DED),
    ],
)
def test_all_flags(
    server: RunningServer, export: str, mode: Mode, contexts: list[str], info: int, go: int
) -> None:
    assert flags_of(server, export, mode, contexts) == (info, go)


@row("F2", "F3")
@pytest.mark.parametrize("export, flags", [("ro", 0x050F), ("raw", 0x0D6D)])
def test_flags_of_export_name(server: RunningServer, export: str, flags: int) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.send(option(Option.EXPORT_NAME, export.encode()))
        assert struct.unpack(">QH", peer.read(10))[1] == flags
        assert peer.ask(Cmd.FLUSH).error == 0


@row("F1", "F6", "F7", "F8")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("export", EXPORTS)
def test_flags_that_belong_together(server: RunningServer, export: str, mode: Mode) -> None:
    for flags in flags_of(server, export, mode):
        assert flags & Flag.HAS_FLAGS
        assert flags & Flag.SEND_FLUSH
        assert flags & Flag.SEND_FUA
        assert flags & Flag.SEND_CACHE
        assert bool(flags & Flag.READ_ONLY) == (export not in WRITABLE)
        assert bool(flags & Flag.SEND_WRITE_ZEROES) == (export in WRITABLE)
        assert bool(flags & Flag.SEND_FAST_ZERO) <= bool(flags & Flag.SEND_WRITE_ZEROES)
        assert not flags & (Flag.ROTATIONAL | Flag.SEND_RESIZE)
        assert not flags & ~0x1FFF


@row("F5")
def test_multi_conn(server: RunningServer) -> None:
    for export in EXPORTS:
        for flags in flags_of(server, export):
            assert bool(flags & Flag.CAN_MULTI_CONN) == (export != "single")


@row("F5")
def test_multi_conn_is_kept(server: RunningServer) -> None:
    """What one connection has written and flushed is what every other one reads."""
    offset = RAW_SCRATCH[1] - 4096
    with server.enter() as writer, server.enter(Mode.EXTENDED) as reader:
        for data in (b"first" * 100, b"again" * 100, bytes(500)):
            assert writer.ask(Cmd.WRITE, offset, payload=data).error == 0
            assert writer.ask(Cmd.FLUSH).error == 0
            assert reader.pread(offset, 500) == data
        assert writer.ask(Cmd.TRIM, offset, 4096, flags=CmdFlag.FUA).error == 0


@row("F12")
@pytest.mark.parametrize("export, size", [("raw", RAW_SIZE), ("odd", ODD_SIZE), ("empty", 0)])
def test_size(server: RunningServer, export: str, size: int) -> None:
    with server.connect() as peer:
        peer.greet()
        assert peer.info(Option.GO, export).size == size
        assert peer.ask(Cmd.FLUSH).error == 0


@row("F12")
@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_size_past_the_limit(tmp_path: Path, size: int) -> None:
    """No image of 2^63 bytes or more is opened, and so none is exported."""
    Image(size=1 << 20).write(tmp_path / "huge.qcow2")
    poke(tmp_path / "huge.qcow2", 24, size.to_bytes(8))
    with pytest.raises(ImageError, match=r"huge\.qcow2"):
        asyncio.run(open_image(tmp_path / "huge.qcow2"))
