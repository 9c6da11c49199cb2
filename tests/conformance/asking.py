"""Requests that succeed, requests that are refused, and the one that proves a connection alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conformance.client import (
    Chunk,
    Cmd,
    CmdFlag,
    Mode,
    Peer,
    Reply,
)
from tests.conformance.running import RunningServer
from tests.conformance.server import pattern

each_mode = pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
chunked = pytest.mark.parametrize(
    "mode", [Mode.STRUCTURED, Mode.EXTENDED], ids=lambda mode: mode.value
)

HUGE = 1 << 30
"""Bytes of address space. A thread takes some as well, but not so many."""

MAX_ERROR_TEXT = 900
"""QEMU's client gives up at 1000 bytes of error payload."""


def write_flags(mode: Mode) -> CmdFlag:
    """What every WRITE of a correct client carries."""
    return CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else CmdFlag(0)


def succeeded(
    peer: Peer,
    command: Cmd,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    payload: bytes = b"",
) -> Reply:
    """Ask for what has to succeed, with a reply of the shape that its mode demands."""
    if command == Cmd.WRITE:
        flags |= write_flags(peer.mode)
    reply = peer.ask(command, offset, length, flags=flags, payload=payload)
    assert reply.error == 0, reply
    if peer.mode is not Mode.SIMPLE and command not in (Cmd.READ, Cmd.BLOCK_STATUS):
        (chunk,) = reply.chunks
        assert chunk.type == Chunk.NONE
    _check_offsets(reply, offset)
    return reply


def refused(
    peer: Peer,
    error: int,
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    payload: bytes = b"",
) -> Reply:
    """Ask for what has to fail with ``error``, and then for what has to succeed."""
    if command == Cmd.WRITE and payload:
        flags |= write_flags(peer.mode)
    cookie = peer.request(command, offset, length, flags=flags, payload=payload)
    reply = peer.reply()
    assert reply.cookie == cookie
    is_refusal(peer.mode, reply, error, offset)
    still_serves(peer)
    return reply


def is_refusal(mode: Mode, reply: Reply, error: int, offset: int) -> None:
    """A reply is one error and nothing else."""
    assert reply.error == error, reply
    if mode is not Mode.SIMPLE:
        (chunk,) = reply.chunks
        assert chunk.type in (Chunk.ERROR, Chunk.ERROR_OFFSET)
        assert len(chunk.payload) <= MAX_ERROR_TEXT + 14
    _check_offsets(reply, offset)


def still_serves(peer: Peer) -> None:
    """The connection is in step: the next request gets its reply. Not for an empty export."""
    assert peer.pread(0, 512) == pattern(0, 512)


@contextmanager
def in_little_memory(server: RunningServer) -> Iterator[None]:
    """What is done inside takes next to no memory, and asks for none that it does not touch."""
    before = _peak_address_space(server)
    with server.flat_memory():
        yield
    assert _peak_address_space(server) - before < HUGE


def _peak_address_space(server: RunningServer) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) << 10


def _check_offsets(reply: Reply, offset: int) -> None:
    """Every chunk of an extended reply repeats the offset of the request, errors included."""
    assert all(chunk.offset in (None, offset) for chunk in reply.chunks)
