"""Who takes no replies, or does not end a request, has to go; who only says nothing may stay."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.errors import ProtocolError
from pynbd.server import stalls
from pynbd.server.limits import Limits
from tests.server.session import DISC, FLUSH, READ, WRITE, Mode, Talk, talking

M = 1 << 20
SIZE = 4 * M
LIMITS = Limits(stall_seconds=0.3)
NOT_TAKEN = "it has taken too little of its replies for 0.3 s"
NOT_BROUGHT = "it has brought too little of a request for 0.3 s"


@pytest.fixture(params=[True, False], ids=["lent", "copied"])
async def node(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[BlockNode]:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    async with await open_image(path, format="raw", read_only=False) as node:
        assert node.file is not None
        node.file.lends_pages = request.param
        yield node


async def given_up(talk: Talk, why: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        await asyncio.wait_for(asyncio.shield(talk.running), 20)
    assert str(raised.value) == why
    assert talk.transmission._share.held == 0


def flood(talk: Talk) -> list[bytes]:
    """More than fits between the two."""
    return [talk.client.request(READ, 0, M) for _ in range(32)]


async def test_replies_that_nobody_takes(node: BlockNode) -> None:
    async with talking(node, limits=LIMITS) as talk:
        await talk.client.send(*flood(talk))
        await given_up(talk, NOT_TAKEN)


async def test_replies_that_are_taken_byte_by_byte(node: BlockNode) -> None:
    async with talking(node, limits=LIMITS) as talk:
        await talk.client.send(*flood(talk))
        while not talk.running.done():
            await asyncio.get_running_loop().sock_recv(talk.client.sock, 1)
            await asyncio.wait([talk.running], timeout=0.02)
        await given_up(talk, NOT_TAKEN)


@pytest.mark.parametrize("ending", ["DISC", "half-closed"])
async def test_who_leaves_without_its_replies(node: BlockNode, ending: str) -> None:
    async with talking(node, limits=LIMITS) as talk:
        await talk.client.send(*flood(talk))
        if ending == "DISC":
            await talk.client.send(talk.client.request(DISC))
        else:
            talk.client.sock.shutdown(socket.SHUT_WR)
        await given_up(talk, NOT_TAKEN)


async def test_replies_that_are_taken_slowly(
    node: BlockNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At more than the least rate, for several times the limit: all of them come."""
    monkeypatch.setattr(stalls, "LEAST_RATE", 64)
    async with talking(node, limits=LIMITS) as talk:
        await talk.client.send(*flood(talk))
        for cookie in range(1, 33):
            await talk.client.reply(cookie)
            await asyncio.sleep(0.03)
        assert len(talk.client.replies) == 32


@pytest.mark.parametrize("part", [1, 27, 28 + 100, 28 + M // 2], ids=str)
async def test_a_request_that_does_not_end(node: BlockNode, part: int) -> None:
    async with talking(node, limits=LIMITS) as talk:
        await talk.client.send(talk.client.request(WRITE, 0, payload=bytes(M))[:part])
        await given_up(talk, NOT_BROUGHT)


@pytest.mark.parametrize("offset", [0, SIZE], ids=["payload", "refused payload"])
async def test_a_payload_that_comes_byte_by_byte(node: BlockNode, offset: int) -> None:
    async with talking(node, limits=LIMITS) as talk:
        write = talk.client.request(WRITE, offset, payload=bytes(M))
        await talk.client.send(write[: M // 2])
        while not talk.running.done():
            await talk.client.send(b"\0")
            await asyncio.wait([talk.running], timeout=0.02)
        await given_up(talk, NOT_BROUGHT)


async def test_requests_that_come_slowly_and_end(node: BlockNode) -> None:
    """A client is in the middle of a request all the time, but each one ends."""
    async with talking(node, limits=LIMITS) as talk:
        requests = b"".join(talk.client.request(FLUSH) for _ in range(8))
        await talk.client.send(requests[:14])
        for at in range(14, len(requests), 14):
            await asyncio.sleep(0.06)
            await talk.client.send(requests[at : at + 14])
        await talk.client.all_replies()
        assert len(talk.client.replies) == 8


@pytest.mark.parametrize("mode", Mode)
async def test_silence_between_requests(node: BlockNode, mode: Mode) -> None:
    """For longer than the limit, before the first one and after long ones."""
    async with talking(node, mode, limits=LIMITS) as talk:
        for _ in range(2):
            await asyncio.sleep(0.7)
            await talk.client.send(*flood(talk))
            await talk.client.all_replies()
            reply = await talk.client.ask(WRITE, 0, payload=bytes(M))
            assert not reply.error
        assert talk.transmission._stalls._timer is None or not talk.running.done()
