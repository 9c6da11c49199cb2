"""What requests cost on the ways that have to be short: counted, through a socket, never timed.

The images are qemu-img's. Where the kernel decides (how much one send takes) there is some room.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from interop import peers
from interop.samples import qemu_io
from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.chain import open_image
from pynbd.block.engine import WRITE_NOW_MAX, HostFile
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import loop_share
from pynbd.block.qcow2.compressed import TURN_BYTES
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.block.qcow2.refcounts import Refcounts
from pynbd.block.resolved import ResolvedWindows
from pynbd.server.contexts import standard_contexts
from pynbd.server.stream import COPY_PIECE
from tests.conformance import client as conformance
from tests.server.counting import (
    Costs,
    in_page_cache,
    peak_memory,
    spread,
    table_lookups,
    take,
    tcp_pair,
)
from tests.server.session import BLOCK_STATUS, FLUSH, READ, WRITE, Mode, Talk, talking

K, M = 1 << 10, 1 << 20
SIZE = 4 * M
BYTES = random.Random(50).randbytes(SIZE)
DATA_HEAD = 28  # a structured reply chunk with OFFSET_DATA, before its data
BATCH = 16


class Disk(NamedTuple):
    """An image, the files it is made of, and what it reads as."""

    path: Path
    files: list[Path]
    content: bytes
    format: str = "qcow2"


def raw(folder: Path) -> Disk:
    path = folder / "disk.raw"
    path.write_bytes(BYTES)
    return Disk(path, [path], BYTES, "raw")


def qcow2(folder: Path, *options: str) -> Disk:
    """Every cluster is allocated."""
    path = folder / "disk.qcow2"
    peers.run("qemu-img", "convert", "-O", "qcow2", *options, raw(folder).path, path)
    return Disk(path, [path], BYTES)


def chain(folder: Path) -> Disk:
    """Three layers; every third cluster comes from each."""
    below = qcow2(folder).path
    content = bytearray(BYTES)
    files = [below]
    for layer in (1, 2):
        path = folder / f"layer{layer}.qcow2"
        backing = ["-b", files[-1].name, "-F", "qcow2"]
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path)
        places = range(layer * 64 * K, SIZE, 3 * 64 * K)
        qemu_io(path, *(f"write -q -P {layer} {at} 64k" for at in places))
        for at in places:
            content[at : at + 64 * K] = bytes([layer]) * 64 * K
        files.append(path)
    return Disk(files[-1], files, bytes(content))


def empty(folder: Path) -> Disk:
    path = folder / "empty.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    return Disk(path, [path], bytes(64 * M))


def overlay(folder: Path) -> Disk:
    base, path = raw(folder).path, folder / "overlay.qcow2"
    backing = ["-b", base.name, "-F", "raw"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path)
    return Disk(path, [base, path], BYTES)


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the sessions of the test go over."""
    if request.param == "tcp":
        monkeypatch.setattr(socket, "socketpair", tcp_pair)
    return str(request.param)


class Served(NamedTuple):
    talk: Talk
    node: BlockNode
    disk: Disk


@asynccontextmanager
async def serving(
    disk: Disk, costs: Costs, mode: Mode = Mode.STRUCTURED, *, read_only: bool = True
) -> AsyncIterator[Served]:
    """A session on a disk in the page cache."""
    with in_page_cache(*disk.files):
        async with (
            await open_image(disk.path, format=disk.format, read_only=read_only) as node,
            talking(node, mode, wrap=costs.wrap) as talk,
        ):
            yield Served(talk, node, disk)


async def reads(served: Served, offsets: list[int], length: int) -> None:
    """A batch, sent as one; what comes is right, and in the order in which it was asked for."""
    client = served.talk.client
    first = len(client.order)
    batch = [client.request(READ, offset, length) for offset in offsets]
    await client.send(*batch)
    await client.all_replies()
    replies = [client.replies[cookie] for cookie in client.order[first:]]
    for offset, reply in zip(offsets, replies, strict=True):
        assert reply.data(offset, length) == served.disk.content[offset : offset + length]


async def writes(served: Served, offsets: list[int], length: int = 4 * K) -> None:
    client = served.talk.client
    batch = [client.request(WRITE, at, payload=os.urandom(length)) for at in offsets]
    await client.send(*batch)
    await client.all_replies()
    assert not any(reply.error for reply in client.replies.values())


every_image = pytest.mark.parametrize("image", [raw, qcow2, chain], ids=lambda make: make.__name__)
Make = Callable[[Path], Disk]


# Short reads


@every_image
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
async def test_a_batch_of_short_reads(
    tmp_path: Path, costs: Costs, image: Make, mode: Mode
) -> None:
    """One receive brings them all, and one more finds that there is nothing else. The page cache
    gives the bytes of each by one read, into the memory that one send takes. The first read has
    looked the mapping up; nobody looks again, however many layers there are.
    """
    async with serving(image(tmp_path), costs, mode) as served:
        offsets = spread(BATCH, 64 * K)
        await reads(served, [0], 512)
        before = table_lookups(served.node)
        resolved = costs.times(BlockNode, "resolve")
        await costs.at_best(lambda: reads(served, [offset + 4 * K for offset in offsets], 4 * K))
        assert costs.socket == {"recv": 2, "send": 1}
        assert costs.reads() == costs.reads(in_loop=True) == [4 * K] * BATCH
        assert (costs.tasks, costs.hops) == (0, 0)
        assert table_lookups(served.node) == before
        assert resolved == []


@every_image
async def test_a_short_read_by_itself(
    tmp_path: Path, costs: Costs, transport: str, image: Make
) -> None:
    """Receive, read, send, and a look for more."""
    async with serving(image(tmp_path), costs) as served:
        await reads(served, [64 * K], 4 * K)
        await costs.at_best(lambda: reads(served, [192 * K], 4 * K))
        assert costs.socket == {"recv": 2, "send": 1}
        assert costs.reads(in_loop=True) == costs.reads() == [4 * K]
        assert (costs.tasks, costs.hops) == (0, 0)


async def test_short_reads_need_no_memory(tmp_path: Path, costs: Costs) -> None:
    """The replies are made in a buffer that is there: a batch of 64 KiB in all takes less than a
    quarter of that, for all small things of the interpreter.
    """
    async with serving(qcow2(tmp_path), costs) as served:
        client, into, peaks = served.talk.client, bytearray(M), list[int]()
        offsets = spread(BATCH, 4 * K)
        for _ in range(4):  # the first time makes what stays
            batch = b"".join(client.request(READ, offset, 4 * K) for offset in offsets)
            with peak_memory(peaks):
                await client.send(batch)
                await take(client.sock, BATCH * (4 * K + DATA_HEAD), into)
        assert min(peaks) < 16 * K


# Long reads


def long_replies(lengths: list[int]) -> int:
    """The bytes of replies to structured reads of plain data: a head, the data, the end."""
    return sum(length + DATA_HEAD + 20 for length in lengths)


@pytest.mark.parametrize("length", [256 * K, M])
@pytest.mark.parametrize("image", [raw, qcow2, chain], ids=lambda make: make.__name__)
async def test_a_long_read_of_what_is_only_read(
    tmp_path: Path, costs: Costs, transport: str, image: Make, length: int
) -> None:
    """The kernel moves the bytes from the page cache to the socket: they never come into this
    process, which needs no memory for them, no Task and no hop.
    """
    async with serving(image(tmp_path), costs) as served:
        _needs_cachestat(served)
        await reads(served, [0], length)
        await costs.at_best(lambda: reads(served, [M], length))
        assert sum(costs.sent()) == length
        assert costs.reads() == []
        assert (costs.tasks, costs.hops) == (0, 0)


@pytest.mark.parametrize("length", [256 * K, M])
async def test_a_long_read_of_a_qcow2_that_is_written(
    tmp_path: Path, costs: Costs, transport: str, length: int
) -> None:
    """Over a unix socket, which tells what the peer has taken, the pages are lent, as they are from
    what is only read. TCP does not tell: the bytes are copied in the loop, in pieces, a piece for
    each send and again what a send did not take.
    """
    async with serving(qcow2(tmp_path), costs, read_only=False) as served:
        _needs_cachestat(served)
        await reads(served, [0], length)
        await costs.at_best(lambda: reads(served, [M], length))
        assert (costs.tasks, costs.hops) == (0, 0)
        if transport == "unix":
            assert sum(costs.sent()) == length
            assert costs.reads() == []
        else:
            assert costs.sent() == []
            assert costs.reads() == costs.reads(in_loop=True)
            assert max(costs.reads()) <= COPY_PIECE
            assert sum(costs.reads()) >= length
            assert len(costs.reads()) <= costs.socket["send"]


@pytest.mark.parametrize("read_only", [True, False], ids=["read-only", "writable"])
async def test_long_reads_need_no_memory(
    tmp_path: Path, costs: Costs, transport: str, read_only: bool
) -> None:
    """Nobody allocates what is lent, or goes through a buffer that is there. The same for a batch
    of four that the socket does not take at once.
    """
    async with serving(qcow2(tmp_path), costs, read_only=read_only) as served:
        _needs_cachestat(served)
        client, into, peaks = served.talk.client, bytearray(M), list[int]()
        for count in (1, 4):
            for _ in range(4):  # the first time makes what stays
                batch = b"".join(client.request(READ, at * M, M) for at in range(count))
                with peak_memory(peaks):
                    await client.send(batch)
                    await take(client.sock, long_replies([M] * count), into)
            assert min(peaks) < 64 * K
            peaks.clear()


@pytest.mark.parametrize("image", [raw, qcow2], ids=lambda make: make.__name__)
async def test_a_cold_read_is_one_hop(tmp_path: Path, costs: Costs, image: Make) -> None:
    """Of 1 MiB that the page cache does not hold: one call in the pool reads it with one system
    call, and nothing is read in the loop but, perhaps, probes. One Task waits.
    """
    async with serving(image(tmp_path), costs) as served:
        file = served.node.file
        assert file is not None
        await reads(served, [0], 4 * K)
        file._nowait = file._cachestat = False  # as if nothing was ever in the page cache
        costs.start()
        await reads(served, [M], M)
        costs.stop()
        assert costs.reads(in_loop=False) == [M]
        assert costs.reads(in_loop=True) == []
        assert (costs.tasks, costs.hops) == (1, 1)


def _needs_cachestat(served: Served) -> None:
    for node in served.node.chain():
        assert node.file is not None
        if not node.file.resident(0, 4 * K):
            pytest.skip("cachestat needs Linux 6.5")


# Writes


@pytest.mark.parametrize("image", [raw, qcow2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
async def test_a_batch_of_writes_in_place(
    tmp_path: Path, costs: Costs, image: Make, mode: Mode
) -> None:
    """Pages that are written whole, in a file that nobody flushes: each is one call in the loop at
    most. The mapping stays as it is, so nothing is forgotten, and no table is asked for again.
    """
    async with serving(image(tmp_path), costs, mode, read_only=False) as served:
        await reads(served, [0], 512)
        await writes(served, [0])
        forgotten = costs.times(ResolvedWindows, "forget")
        before = table_lookups(served.node)
        costs.start()
        await writes(served, spread(BATCH, 64 * K))
        costs.stop()
        assert len(costs.writes()) <= BATCH
        assert sum(costs.writes()) == BATCH * 4 * K
        assert costs.reads() == []
        assert (costs.tasks, costs.hops) == (0, 0)
        assert costs.socket["send"] == 1
        assert costs.socket["recv"] <= 3  # the kernel may bring them in two parts
        assert forgotten == []
        assert table_lookups(served.node) == before


async def test_batches_of_writes_to_new_clusters(tmp_path: Path, costs: Costs) -> None:
    """Sixteen clusters each that are not there, in an L2 table that is. They are looked for once,
    and come from the end of the file, where all is zero: only what the guest gave is written. All
    that is needed is in memory, so nothing waits: no Task, no hop, no read. Metadata stay in memory
    until a flush. A file that has to become longer does so by more than one batch needs.
    """
    async with serving(empty(tmp_path), costs, read_only=False) as served:
        await writes(served, [60 * M])
        asked = costs.times(Refcounts, "allocate")
        longer = costs.times(HostFile, "resize")
        costs.start()
        for batch in range(8):
            await writes(served, [batch * 2 * M + offset for offset in spread(BATCH, 64 * K)])
        costs.stop()
        assert len(longer) < 8
        assert (costs.tasks, costs.hops) == (0, 0)
        assert asked == [(BATCH,)] * 8
        assert len(costs.writes()) <= 8 * BATCH
        assert sum(costs.writes()) == 8 * BATCH * 4 * K
        assert costs.reads() == []
        assert costs.syncs() == 0


@pytest.mark.parametrize(
    "offsets, ranges",
    [
        ([at * 64 * K for at in range(BATCH)], 1),
        ([at * 4 * K for at in range(BATCH)], 1),
        (spread(BATCH, 64 * K), BATCH),
    ],
    ids=["neighbours", "one cluster", "apart"],
)
async def test_the_mapping_is_forgotten_once_a_range(
    tmp_path: Path, costs: Costs, offsets: list[int], ranges: int
) -> None:
    """Clusters that follow one another are one range, and so are parts of one cluster."""
    async with serving(empty(tmp_path), costs, read_only=False) as served:
        await writes(served, [60 * M])
        forgotten = costs.times(ResolvedWindows, "forget")
        costs.start()
        await writes(served, offsets)
        costs.stop()
        assert len(forgotten) <= ranges


async def test_a_batch_of_copies_on_write(tmp_path: Path, costs: Costs) -> None:
    """What is cached of the backing file is read in the loop, one call a cluster, and written with
    the new bytes laid over it, so much in each turn of the loop: no hop. Two Tasks: the
    connection's, and the one that goes on when the client leaves.
    """
    async with serving(overlay(tmp_path), costs, read_only=False) as served:
        await writes(served, [SIZE - 4 * K])
        asked = costs.times(Refcounts, "allocate")
        costs.start()
        await writes(served, [offset + 8 * K for offset in spread(BATCH, 64 * K)])
        costs.stop()
        assert costs.hops == 0
        assert costs.tasks <= 2
        assert asked == [(BATCH,)]
        assert costs.reads() == [64 * K] * BATCH
        assert costs.writes() == [WRITE_NOW_MAX] * (BATCH * 64 * K // WRITE_NOW_MAX)
        assert costs.syncs() == 0


async def test_whole_clusters_are_not_copied(tmp_path: Path, costs: Costs) -> None:
    """Nothing of the backing file is left of a cluster that the guest writes as a whole."""
    async with serving(overlay(tmp_path), costs, read_only=False) as served:
        await writes(served, [SIZE - 64 * K], 64 * K)
        costs.start()
        await writes(served, [0, 128 * K, 256 * K], 64 * K)
        costs.stop()
        assert costs.reads() == []
        assert sum(costs.writes()) == 3 * 64 * K


# Flushes


async def flush_of_a_batch(served: Served, costs: Costs, before: int) -> None:
    """Count the FLUSH of a batch of writes. What the first write of all brings with it was flushed
    before: that was to ``before``.
    """
    await writes(served, [before])
    await served.talk.client.ask(FLUSH)
    await writes(served, spread(BATCH, 64 * K))
    costs.start()
    reply = await served.talk.client.ask(FLUSH)
    costs.stop()
    assert not reply.error


@pytest.mark.parametrize("image", [raw, qcow2], ids=lambda make: make.__name__)
async def test_a_flush_of_nothing_but_data(tmp_path: Path, costs: Costs, image: Make) -> None:
    """One hop that makes one fdatasync, and writes nothing."""
    async with serving(image(tmp_path), costs, read_only=False) as served:
        await flush_of_a_batch(served, costs, before=0)
        assert (costs.syncs(), costs.hops) == (1, 1)
        assert costs.writes() == []


async def test_a_flush_of_new_clusters(tmp_path: Path, costs: Costs) -> None:
    """docs/design.md, "The order of writes": refcounts and bytes before the links (REFERENCED), the
    links before it is answered (FREED). Two barriers, and a write for each page of the two tables.
    """
    async with serving(empty(tmp_path), costs, read_only=False) as served:
        await flush_of_a_batch(served, costs, before=60 * M)
        assert costs.syncs() == 2
        assert len(costs.writes()) == 2
        assert sum(costs.writes()) == 2 * 4 * K


async def test_flushes_that_come_together_share(tmp_path: Path, costs: Costs) -> None:
    """The first of a batch begins at once; all that wait meanwhile share another."""
    async with serving(qcow2(tmp_path), costs, read_only=False) as served:
        await writes(served, [0])
        client = served.talk.client
        costs.start()
        await client.send(*(client.request(FLUSH) for _ in range(BATCH)))
        await client.all_replies()
        costs.stop()
        assert costs.syncs() <= 2


# Block status


@pytest.mark.parametrize("wanted, maps", [([0], 1), ([1], 1), ([0, 1], 1), ([5], 0), ([2, 7], 0)])
async def test_a_block_status_of_some_contexts(
    tmp_path: Path, costs: Costs, wanted: list[int], maps: int
) -> None:
    """Of eight, six of which are bitmaps: the image is mapped once for those that need it, and not
    at all for bitmaps; bitmaps that are not wanted are not looked into.
    """
    path = qcow2(tmp_path).path
    for number in range(6):
        peers.run("qemu-img", "bitmap", "--add", "-g", "64k", path, f"b{number}")
    async with await open_image(path) as node:
        contexts = standard_contexts(depth=True, bitmaps=node.bitmaps())
        async with talking(node, Mode.EXTENDED, contexts=contexts) as talk:
            await talk.client.ask(BLOCK_STATUS, 0, SIZE)
            mapped, looked = costs.times(BlockNode, "map"), costs.times(DirtyBitmap, "runs")
            costs.start()
            chosen = struct.pack(f">Q{len(wanted)}I", SIZE, *wanted)
            reply = await talk.client.ask(BLOCK_STATUS, 0, payload=chosen)
            costs.stop()
    assert len(contexts) == 8
    assert list(reply.status) == wanted
    assert len(mapped) == maps
    assert len(looked) == sum(number >= 2 for number in wanted)


# Compressed clusters


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
async def test_compressed_clusters(
    tmp_path: Path, costs: Costs, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen clusters: the compressed bytes are in the page cache and are read in the loop, one
    read each at most. As many as a turn of the loop may decompress are answered in it; the others
    take a Task each, and fewer hops than half of all requests. Who asks for the same bytes again
    finds them decompressed: no read, no hop, no Task.
    """
    monkeypatch.setattr(loop_share, "perf_counter", lambda: 0)  # a turn is as long as it takes
    (tmp_path / "disk.raw").write_bytes(b"".join(b"%4095d\n" % at for at in range(SIZE // (4 * K))))
    path = tmp_path / "disk.qcow2"
    convert = ["convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}"]
    peers.run("qemu-img", *convert, tmp_path / "disk.raw", path)
    disk = Disk(path, [path], (tmp_path / "disk.raw").read_bytes())
    async with serving(disk, costs) as served:
        node = served.node
        assert isinstance(node, Qcow2Node)
        await reads(served, [SIZE - 4 * K], 4 * K)
        client, offsets = served.talk.client, spread(BATCH, 64 * K)
        costs.start()
        await client.send(*(client.request(READ, offset, 4 * K) for offset in offsets))
        await client.all_replies()
        costs.stop()
        assert len(costs.reads()) == len(costs.reads(in_loop=True)) <= BATCH
        assert costs.hops < BATCH // 2
        assert costs.tasks <= BATCH - TURN_BYTES // (64 * K)
        for round_ in range(2):
            costs.start()
            await reads(served, offsets, 4 * K)
            costs.stop()
            assert costs.reads() == [], round_
            assert (costs.tasks, costs.hops) == (0, 0)
            assert costs.socket == {"recv": 2, "send": 1}


# The whole server


@pytest.mark.skipif(shutil.which("strace") is None, reason="it needs strace")
def test_system_calls_of_the_server(tmp_path: Path) -> None:
    """100 batches of 16 reads, each sent when the one before was answered. For each batch: a wait
    in the loop (epoll, of which uvloop may do one more), a receive, another that finds nothing, and
    a send; for each request, one read. What begins and ends a connection is fewer than 90 calls.
    """
    disk, batches, told = raw(tmp_path), 100, tmp_path / "calls"
    names = "recvfrom,recvmsg,sendto,sendmsg,preadv2,pread64,epoll_wait,epoll_pwait,epoll_ctl"
    with peers.socket_path() as where, in_page_cache(disk.path):
        strace = ["strace", "-D", "-f", "--seccomp-bpf", "-o", str(told), "-e", f"trace={names}"]
        serve = [sys.executable, "-m", "pynbd", "serve", "-r", "-f", "raw", "-k", str(where)]
        with (
            peers.listening([*strace, *serve, str(disk.path)], where),
            conformance.Peer(where) as peer,
        ):
            peer.negotiate()
            for batch in range(batches):
                offsets = [at + 4 * K for at in spread(BATCH, 64 * K, batch)]
                peer.send(
                    b"".join(conformance.request(peer.mode, READ, at, 4 * K) for at in offsets)
                )
                for at in offsets:
                    assert peer.read(16 + 4 * K)[16:] == disk.content[at : at + 4 * K]
            peer.disconnect()
    for _ in range(500):
        if "+++" in told.read_text():
            break
        time.sleep(0.01)
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", told.read_text(), re.MULTILINE))
    most = {"preadv2": BATCH, "recvfrom": 2, "sendto": 1, "epoll_wait": 2, "epoll_pwait": 2}
    assert calls["preadv2"] >= BATCH * batches
    assert not {
        name: count for name, count in calls.items() if count > 90 + batches * most.get(name, 0)
    }
