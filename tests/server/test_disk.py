"""Disks of one's own: what a subclass overrides is what its clients are told and get.

Transmission flags are those of the NBD specification ("Transmission flags"); errors those of "Error
values".
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pynbd.errors import UsageError
from pynbd.protocol.metadata import encode_filter
from pynbd.protocol.values import State, TransmissionFlag
from pynbd.server.disk import Disk, DiskNode, StatusMethod, StatusRows
from pynbd.server.export import Export
from pynbd.server.serving import serve
from tests.server.session import (
    BLOCK_STATUS,
    CACHE,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Mode,
    Talk,
    talking,
)

MIB = 1 << 20


class Numbered(Disk):
    """Every byte is the lowest byte of its offset's page. Read-only."""

    size = 64 * MIB

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def pread(self, offset: int, length: int) -> bytes:
        self.calls.append(("pread", offset, length))
        return bytes(at >> 12 & 0xFF for at in range(offset, offset + length))


class Memory(Disk):
    """Writable, with nothing that need not be."""

    def __init__(self, size: int = 4 * MIB) -> None:
        self.size = size
        self.data = bytearray(size)
        self.calls: list[tuple[Any, ...]] = []

    async def pread(self, offset: int, length: int) -> memoryview:
        return memoryview(self.data)[offset : offset + length]

    async def pwrite(self, offset: int, data: bytes) -> None:
        self.calls.append(("pwrite", offset, len(data)))
        self.data[offset : offset + len(data)] = data


class Able(Memory):
    """Everything."""

    block_size = 65536

    async def flush(self) -> None:
        self.calls.append(("flush",))

    async def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        self.calls.append(("write_zeroes", offset, length, may_unmap))
        self.data[offset : offset + length] = bytes(length)

    async def cache(self, offset: int, length: int) -> None:
        self.calls.append(("cache", offset, length))

    async def close(self) -> None:
        self.calls.append(("close",))


class Mapped(Numbered):
    """Its map and a context of its own are ``rows`` and ``heat``."""

    size = 8192

    def __init__(self, rows: Iterable[tuple[Any, Any]], heat: Iterable[tuple[Any, Any]]) -> None:
        super().__init__()
        self.rows = rows
        self.heat = heat

    async def map(self, offset: int, length: int) -> StatusRows:
        self.calls.append(("map", offset, length))
        return self.rows

    def contexts(self) -> Mapping[str, StatusMethod]:
        return {"x-heat:reads": self.reads}

    async def reads(self, offset: int, length: int) -> StatusRows:
        self.calls.append(("reads", offset, length))
        return self.heat


class Raising(Memory):
    """Raises ``error`` whatever it is asked."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def pread(self, offset: int, length: int) -> memoryview:
        raise self.error

    async def pwrite(self, offset: int, data: bytes) -> None:
        raise self.error


def exported(disk: Disk, **rest: Any) -> Export:
    node = DiskNode(disk, **rest)
    return Export("", node, contexts=node.contexts)


@asynccontextmanager
async def asking(disk: Disk, mode: Mode = Mode.STRUCTURED, **rest: Any) -> AsyncIterator[Talk]:
    export = exported(disk, **rest)
    async with talking(export.node, mode, export=export) as talk:
        yield talk


# What clients are told


@pytest.mark.parametrize(
    "disk, says",
    [
        (Numbered(), {"READ_ONLY"}),
        (Memory(), {"SEND_WRITE_ZEROES", "SEND_FAST_ZERO"}),
        (Able(), {"SEND_WRITE_ZEROES", "SEND_FAST_ZERO", "SEND_TRIM", "SEND_CACHE"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_overridden_is_what_it_can(disk: Disk, says: set[str]) -> None:
    always = {"HAS_FLAGS", "SEND_FLUSH", "SEND_FUA", "CAN_MULTI_CONN"}
    flags = exported(disk).info.flags
    assert {flag.name for flag in TransmissionFlag if flag in flags} == always | says


def test_a_writable_disk_served_read_only() -> None:
    info = exported(Able(), read_only=True).info
    assert TransmissionFlag.READ_ONLY in info.flags
    assert not TransmissionFlag.SEND_TRIM & info.flags
    assert not TransmissionFlag.SEND_WRITE_ZEROES & info.flags


def test_sizes() -> None:
    assert exported(Memory(12345)).info.size == 12345
    assert exported(Memory()).info.block_size == (1, 4096, 32 * MIB)
    assert exported(Able()).info.block_size == (1, 65536, 32 * MIB)


def test_contexts_are_named() -> None:
    assert exported(Memory()).info.contexts == ("base:allocation",)
    assert exported(Mapped([], [])).info.contexts == ("base:allocation", "x-heat:reads")


@pytest.mark.parametrize(
    "attribute, value, text",
    [
        ("size", -1, r"Memory.size: -1 is not a whole number from 0 to 9223372036854775807"),
        ("size", 1 << 63, r"Memory.size: 9223372036854775808 is not"),
        ("size", "1M", r"Memory.size: '1M' is not a whole number"),
        ("size", 1e6, r"Memory.size: 1000000.0 is not"),
        ("block_size", 256, r"Memory.block_size: 256 is not a whole number from 512 to 33554432"),
        ("block_size", 1000, r"Memory.block_size: a power of two"),
    ],
)
def test_numbers_that_make_no_disk(attribute: str, value: object, text: str) -> None:
    disk = Memory()
    setattr(disk, attribute, value)
    with pytest.raises(UsageError, match=text):
        DiskNode(disk)


def test_a_size_is_needed() -> None:
    class Nothing(Disk):
        async def pread(self, offset: int, length: int) -> bytes:
            return bytes(length)

    with pytest.raises(UsageError, match=r"Nothing.size: None is not a whole number"):
        DiskNode(Nothing())
    with pytest.raises(TypeError, match="pread"):
        Disk()  # type: ignore[abstract]


def test_methods_are_async() -> None:
    class Sync(Memory):
        def flush(self) -> None:  # type: ignore[override]
            pass

    with pytest.raises(UsageError, match=r"Sync\.flush: it has to be an `async def` method"):
        DiskNode(Sync())


@pytest.mark.parametrize(
    "name, text",
    [
        ("heat", "'heat' is not of the form namespace:leaf"),
        ("x-heat:", "'x-heat:' is not of the form"),
        (":reads", "':reads' is not of the form"),
        ("base:heat", "'base:heat': base:allocation is made by `map`"),
        ("base:allocation", "base:allocation is made by `map`"),
        ("x-heat:" + "é" * 2045, "it has 4097 bytes; at most 4096"),
        ("x-heat:\ud800", "it has to be UTF-8"),
        (5, "5 is not the name of a context"),
    ],
)
def test_names_that_no_context_has(name: str, text: str) -> None:
    class Named(Numbered):
        def contexts(self) -> Mapping[str, StatusMethod]:
            return {name: self.map}

    with pytest.raises(UsageError, match=text):
        DiskNode(Named())


def test_the_longest_name() -> None:
    name = "x-heat:" + "h" * 4089

    class Named(Numbered):
        def contexts(self) -> Mapping[str, StatusMethod]:
            return {name: self.map}

    assert list(DiskNode(Named()).contexts) == ["base:allocation", name]


# Reading


@pytest.mark.parametrize("mode", Mode)
async def test_read(mode: Mode) -> None:
    async with asking(Numbered(), mode) as talk:
        reply = await talk.client.ask(READ, 4095, 3)
        assert reply.data(4095, 3) == b"\0\1\1"


async def test_the_longest_read_is_one_call() -> None:
    class Zeroes(Memory):
        async def pread(self, offset: int, length: int) -> memoryview:
            self.calls.append((offset, length))
            return await super().pread(offset, length)

    disk = Zeroes(80 * MIB)
    disk.data[-3:] = b"end"
    async with asking(disk) as talk:
        reply = await talk.client.ask(READ, 48 * MIB, 32 * MIB)
        assert reply.data(48 * MIB, 32 * MIB) == bytes(32 * MIB - 3) + b"end"
    assert disk.calls == [(48 * MIB, 32 * MIB)]


async def test_calls_overlap() -> None:
    class Meeting(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.here = 0
            self.all_here = asyncio.Event()

        async def pread(self, offset: int, length: int) -> memoryview:
            self.here += 1
            if self.here == 3:
                self.all_here.set()
            await self.all_here.wait()
            return await super().pread(offset, length)

    async with asking(Meeting()) as talk:
        client = talk.client
        await client.send(*(client.request(READ, at, 1) for at in (1, 2, 3)))
        await client.all_replies()
        assert all(not reply.error for reply in client.replies.values())


async def test_a_task_is_around_every_call() -> None:
    """asyncio.timeout and TaskGroup need one."""

    class Timed(Memory):
        async def pread(self, offset: int, length: int) -> memoryview:
            async with asyncio.timeout(5), asyncio.TaskGroup() as group:
                return await group.create_task(super().pread(offset, length))

        async def pwrite(self, offset: int, data: bytes) -> None:
            async with asyncio.timeout(5):
                await asyncio.sleep(0.001)
                await super().pwrite(offset, data)

    disk = Timed()
    async with asking(disk) as talk:
        client = talk.client
        await client.send(*(client.request(WRITE, at, payload=b"x") for at in range(4)))
        await client.all_replies()
        assert (await client.ask(READ, 0, 5)).data(0, 5) == b"xxxx\0"


async def test_a_read_is_cancelled_when_the_server_has_to_end() -> None:
    class Endless(Memory):
        began = asyncio.Event()
        ended = asyncio.Event()

        async def pread(self, offset: int, length: int) -> memoryview:
            self.began.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.set()
            raise AssertionError

    disk = Endless()
    async with asking(disk) as talk:
        await talk.client.send(talk.client.request(READ, 0, 1))
        await asyncio.wait_for(disk.began.wait(), 10)
        talk.running.cancel()
    assert disk.ended.is_set()


@pytest.mark.parametrize(
    "answer, text",
    [
        (b"short", "pread returned 5 bytes in place of 10"),
        (b"much too long", "pread returned 13 bytes in place of 10"),
        ("unencoded!", "pread returned str, which is not like bytes"),
        (None, "pread returned NoneType, which is not like bytes"),
    ],
)
async def test_an_answer_that_is_none(
    answer: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Numbered):
        async def pread(self, offset: int, length: int) -> bytes:
            result: bytes = answer
            return result

    async with asking(Wrong()) as talk:
        reply = await talk.client.ask(READ, 0, 10)
        assert (reply.error, reply.message) == (EIO, text)
    [line] = caplog.messages
    assert "Wrong: " in line
    assert text in line


# Errors


@pytest.mark.parametrize(
    "number, error",
    [
        (errno.EIO, EIO),
        (errno.ENOSPC, ENOSPC),
        (errno.EACCES, EPERM),
        (errno.ENOENT, EINVAL),
        (errno.EOPNOTSUPP, EINVAL),
    ],
)
async def test_errno_becomes_the_error(number: int, error: int) -> None:
    async with asking(Raising(OSError(number, os.strerror(number)))) as talk:
        reply = await talk.client.ask(READ, 0, 1)
        assert (reply.error, reply.message) == (error, os.strerror(number))
        assert (await talk.client.ask(WRITE, 0, payload=b"x")).error == error


@pytest.mark.parametrize(
    "defect", [KeyError("there"), TimeoutError(), asyncio.CancelledError("elsewhere")], ids=repr
)
async def test_a_defect_is_told_once(
    defect: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "pynbd")
    async with asking(Raising(defect)) as talk:
        for _ in range(3):
            reply = await talk.client.ask(READ, 0, 1)
            assert (reply.error, reply.message) == (EIO, f"pread raised {type(defect).__name__}")
        assert (await talk.client.ask(WRITE, 0, payload=b"x")).error == EIO
    traces = [message for message in caplog.messages if "Traceback" in message]
    assert len(traces) == 2
    assert "Raising: a defect in pread:\n" in traces[0]
    assert "raise self.error" in traces[0]
    assert "Raising: a defect in pwrite:\n" in traces[1]


async def test_arguments_that_a_method_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    class Outdated(Able):
        async def pwrite(self, offset: int) -> None:  # type: ignore[override]
            pass

        async def write_zeroes(self, offset: int, length: int) -> None:  # type: ignore[override]
            pass

    async with asking(Outdated()) as talk:
        for _ in range(2):
            assert (
                await talk.client.ask(WRITE, 0, payload=b"x")
            ).message == "pwrite raised TypeError"
            reply = await talk.client.ask(WRITE_ZEROES, 0, 5)
            assert (reply.error, reply.message) == (EIO, "write_zeroes raised TypeError")
    assert len([message for message in caplog.messages if "Traceback" in message]) == 2
    assert "a defect in pynbd" not in caplog.text


# Writing


async def test_a_read_only_disk_is_not_written() -> None:
    async with asking(Numbered()) as talk:
        assert (await talk.client.ask(WRITE, 0, payload=b"x")).error == EPERM
        assert (await talk.client.ask(WRITE_ZEROES, 0, 1)).error == EPERM
        assert (await talk.client.ask(FLUSH)).error == 0


async def test_writes_of_a_batch_fail_one_by_one() -> None:
    class Picky(Memory):
        async def pwrite(self, offset: int, data: bytes) -> None:
            if offset == 2:
                raise OSError(errno.ENOSPC, "full")
            await super().pwrite(offset, data)

    disk = Picky()
    async with asking(disk) as talk:
        client = talk.client
        requests = [client.request(WRITE, at, payload=bytes([at]), cookie=at) for at in (1, 2, 3)]
        await client.send(*requests)
        await client.all_replies()
        assert [client.replies[at].error for at in (1, 2, 3)] == [0, ENOSPC, 0]
    assert disk.data[:4] == bytes([0, 1, 0, 3])


async def test_what_is_written_may_be_kept() -> None:
    """It is bytes, not a view of a buffer that is received into again."""

    class Keeping(Memory):
        async def pwrite(self, offset: int, data: bytes) -> None:
            self.calls.append((offset, data))

    disk = Keeping()
    async with asking(disk) as talk:
        for at in range(8):
            await talk.client.ask(WRITE, at, payload=bytes([at]) * 1000)
    assert disk.calls == [(at, bytes([at]) * 1000) for at in range(8)]


async def test_fua_is_a_flush_afterwards() -> None:
    disk = Able()
    async with asking(disk) as talk:
        await talk.client.ask(WRITE, 0, payload=b"x", flags=FUA)
        await talk.client.ask(TRIM, 0, 5, flags=FUA)
        await talk.client.ask(WRITE_ZEROES, 0, 5, flags=FUA | NO_HOLE)
        await talk.client.ask(FLUSH)
    flush = ("flush",)
    assert disk.calls == [
        *(("pwrite", 0, 1), flush),
        *(("discard", 0, 5), flush),
        *(("write_zeroes", 0, 5, False), flush),
        flush,
    ]


async def test_zeroes_that_the_disk_writes() -> None:
    disk = Able()
    async with asking(disk) as talk:
        assert (await talk.client.ask(WRITE_ZEROES, 1, 3 * MIB, flags=FAST_ZERO)).error == 0
    assert disk.calls == [("write_zeroes", 1, 3 * MIB, True)]


async def test_zeroes_without_write_zeroes() -> None:
    disk = Memory()
    disk.data[:] = b"x" * disk.size
    async with asking(disk) as talk:
        reply = await talk.client.ask(WRITE_ZEROES, 5, 3 * MIB, flags=FAST_ZERO)
        assert reply.error == ENOTSUP
        assert disk.data == b"x" * disk.size
        assert (await talk.client.ask(WRITE_ZEROES, 5, 3 * MIB)).error == 0
    assert disk.data == b"x" * 5 + bytes(3 * MIB) + b"x" * (MIB - 5)


async def test_discard_and_cache_without_them() -> None:
    disk = Memory()
    disk.data[:4] = b"data"
    async with asking(disk) as talk:
        assert (await talk.client.ask(TRIM, 0, disk.size)).error == 0
        assert (await talk.client.ask(CACHE, 0, disk.size)).error == 0
    assert disk.data[:4] == b"data"


async def test_cache_is_bounded() -> None:
    disk = Able(64 * MIB)
    async with asking(disk) as talk:
        assert (await talk.client.ask(CACHE, MIB, 63 * MIB)).error == 0
    assert disk.calls == [("cache", MIB, 32 * MIB)]


async def test_close() -> None:
    disk = Able()
    await DiskNode(disk).close()
    assert disk.calls == [("close",)]


async def test_serve() -> None:
    disk = Able()
    async with serve(disk, read_only=True) as server:
        assert server.export.read_only
        assert disk.calls == []
    assert disk.calls == [("close",)]
    with pytest.raises(UsageError, match="depth and bitmaps are those of an image"):
        async with serve(disk, depth=True):
            raise AssertionError


async def test_a_close_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Clinging(Memory):
        async def close(self) -> None:
            raise KeyError("elsewhere")

    with pytest.raises(OSError, match="close raised KeyError"):
        await DiskNode(Clinging()).close()
    assert "a defect in close" in caplog.text


# Metadata contexts

HOLE = State.HOLE | State.ZERO


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])
async def test_two_contexts_side_by_side(mode: Mode) -> None:
    disk = Mapped([(4096, 0), (4096, HOLE)], [(1, 7), (8190, 0), (1, 0xFFFFFFFF)])
    async with asking(disk, mode) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 0, 8192)
        assert reply.status == {
            0: [(4096, 0), (4096, 3)],
            1: [(1, 7), (8190, 0), (1, 0xFFFFFFFF)],
        }
    assert disk.calls == [("map", 0, 8192), ("reads", 0, 8192)]


async def test_all_is_data_without_a_map() -> None:
    async with asking(Memory()) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 5, MIB)
        assert reply.status == {0: [(MIB, 0)]}


async def test_a_hole_that_is_not_zeroes() -> None:
    async with asking(Mapped([(8192, State.HOLE)], [(8192, 0)])) as talk:
        assert (await talk.client.ask(BLOCK_STATUS, 0, 8192)).status[0] == [(8192, 1)]


async def test_answers_are_clipped_and_may_be_short() -> None:
    disk = Mapped([(10, 0)], [(1 << 70, 5), (1, 6)])
    async with asking(disk) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 100, 1000)
        assert reply.status == {0: [(10, 0)], 1: [(1000, 5)]}


async def test_neighbours_alike_are_one() -> None:
    async with asking(Mapped([(10, 0)] * 5, ((1, at // 2) for at in range(4)))) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 0, 1000)
        assert reply.status == {0: [(50, 0)], 1: [(2, 0), (2, 1)]}


async def test_one_extent_is_followed_to_its_end() -> None:
    class Short(Mapped):
        async def map(self, offset: int, length: int) -> StatusRows:
            await super().map(offset, length)
            return [(1000, 0 if offset < 3000 else HOLE)]

    disk = Short([], [(100, 1), (1, 2)])
    async with asking(disk) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 500, 7000, flags=REQ_ONE)
        assert reply.status == {0: [(3000, 0)], 1: [(100, 1)]}
    assert [call for call in disk.calls if call[0] == "reads"] == [("reads", 500, 7000)]


async def test_what_is_filtered_out_is_not_asked() -> None:
    disk = Mapped([(8192, 0)], [(8192, 1)])
    async with asking(disk, Mode.EXTENDED) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 0, payload=encode_filter(4096, [1]))
        assert reply.status == {1: [(4096, 1)]}
    assert disk.calls == [("reads", 0, 4096)]


async def test_endless_answers_end() -> None:
    def endless() -> Iterable[tuple[int, int]]:
        state = 0
        while True:
            yield 1, state
            state ^= 1

    disk = Mapped([(1 << 30, 0)], endless())
    disk.size = 1 << 30
    async with asking(disk) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 0, 1 << 30)
        assert 1 <= len(reply.status[1]) <= 8192


@pytest.mark.parametrize(
    "rows, text",
    [
        ([], "map: an answer without extents"),
        ([(0, 0)], "map: an extent of 0 bytes with the flags 0x0"),
        ([(5, 0), (-5, 0)], "map: an extent of -5 bytes"),
        ([(5, 4)], "map: an extent of 5 bytes with the flags 0x4"),
        ([(5, -1)], "map: an extent of 5 bytes with the flags -0x1"),
        ([(5.0, 0)], "map raised TypeError"),
        ([5], "map raised TypeError"),
        (None, "map raised TypeError"),
    ],
)
async def test_rows_that_are_no_answer(
    rows: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(Mapped(rows, [(8192, 1)])) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 0, 8192)
        assert reply.error == EIO
        assert reply.message.startswith(text)
        assert not reply.status
    assert text in caplog.messages[-1]


async def test_flags_have_32_bits() -> None:
    async with asking(Mapped([(8192, 0)], [(8192, 1 << 32)])) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 0, 8192)
        assert reply.error == EIO
        assert reply.message.startswith("x-heat:reads: an extent of 8192 bytes with the flags")
