"""The end of memory, of descriptors, of threads, of a client, of what a file may be: the requests
that it concerns get their error, others are served, and the server ends in good order.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from interop.faults.process import Served, served
from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Compressed, Data, Image
from pynbd.errors import ImageError, ProtocolError
from pynbd.server.buffers import BufferPool
from tests.block.qcow2.writing import sound
from tests.conformance.client import MAX_PAYLOAD, Cmd, CmdFlag, Errno, Mode, Peer
from tests.server.session import talking

KiB, MiB = 1 << 10, 1 << 20
C = 64 * KiB
NOISE = random.Random(6).randbytes(MiB)


def raw(folder: Path, size: int = 64 * MiB) -> Path:
    """A megabyte of noise, and a hole."""
    path = folder / "x.raw"
    with path.open("wb") as file:
        file.write(NOISE)
        file.truncate(size)
    return path


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_for_which_there_is_no_memory(tmp_path: Path, loop: str) -> None:
    """NBD_ENOMEM; the connection lives, and what is shorter is served."""
    says = r"(pynbd: \S+: NBD_CMD_\w+[^:]* 0\+33554432: Cannot allocate memory\n)+"
    args = ["-f", "raw", "--loop", loop]
    with served(raw(tmp_path), *args, says=says) as server, server.enter() as peer:
        assert peer.pread(0, 4 * KiB) == NOISE[: 4 * KiB]
        # No thread has begun, with an arena of its own from which it could take it.
        server.limit(resource.RLIMIT_AS, server.address_space() + 8 * MiB)
        for _ in range(2):
            assert peer.ask(Cmd.WRITE, payload=bytes(MAX_PAYLOAD)).error == Errno.ENOMEM
            assert peer.ask(Cmd.READ, 0, MAX_PAYLOAD).error == Errno.ENOMEM
            assert peer.pread(C, 4 * KiB) == NOISE[C : C + 4 * KiB]
            assert peer.ask(Cmd.WRITE, 2 * MiB, payload=NOISE[:C]).error == Errno.OK
        with server.enter(Mode.EXTENDED) as other:
            assert other.pread(2 * MiB, C) == NOISE[:C]
        server.limit(resource.RLIMIT_AS, -1)
        assert peer.pread(0, MAX_PAYLOAD)[: 3 * MiB] == NOISE + bytes(MiB) + NOISE[:C] + bytes(
            MiB - C
        )
        assert peer.ask(Cmd.WRITE, payload=bytes(MAX_PAYLOAD)).error == Errno.OK


def test_no_memory_for_a_thread(tmp_path: Path) -> None:
    """What has to wait for a disk is done without: all commands are served."""
    with served(raw(tmp_path), "-f", "raw") as server, server.enter() as peer:
        before = server.threads()
        server.limit(resource.RLIMIT_AS, server.address_space() + 4 * MiB)
        assert peer.pread(8 * MiB, C) == bytes(C)  # in no page cache
        assert peer.ask(Cmd.WRITE, 8 * MiB, payload=NOISE[: C + 1]).error == Errno.OK
        assert peer.ask(Cmd.WRITE_ZEROES, 8 * MiB, 4 * KiB).error == Errno.OK
        assert peer.ask(Cmd.TRIM, 9 * MiB, MiB).error == Errno.OK
        assert peer.ask(Cmd.FLUSH).error == Errno.OK
        assert server.threads() == before
        server.limit(resource.RLIMIT_AS, -1)
        assert peer.ask(Cmd.FLUSH).error == Errno.OK
        assert server.threads() > before
        assert peer.pread(8 * MiB, C) == bytes(4 * KiB) + NOISE[4 * KiB : C]


# Descriptors --------------------------------------------------------------------------------------


def test_no_descriptor_for_a_client(tmp_path: Path) -> None:
    """Those that are there are served; the others come when one has left."""
    says = "pynbd: [^\n]*: Too many open files\n"
    with served(raw(tmp_path), "-r", says=says) as server, server.enter() as peer:
        server.limit(resource.RLIMIT_NOFILE, server.descriptors())
        with Peer(server.socket) as late:
            for _ in range(3):
                assert peer.pread(0, C) == NOISE[:C]
            late.expect_silence()
            peer.disconnect()
            late.negotiate()
            assert late.pread(4 * KiB, C) == NOISE[4 * KiB : 4 * KiB + C]


def test_no_descriptor_for_an_image(tmp_path: Path) -> None:
    """It is not opened: one line, and status 1."""
    below = raw(tmp_path, MiB)
    for number in range(40):
        below, backing = tmp_path / f"{number}.qcow2", below
        driver = backing.suffix[1:]
        Image(size=MiB, backing_file=backing.name, backing_format=driver).write(below)
    line = ["prlimit", "--nofile=32:32", sys.executable, "-m", "pynbd", "serve"]
    line += ["-k", str(tmp_path / "socket"), str(below)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"pynbd: {tmp_path}/")
    assert ": cannot be opened: Too many open files" in said


# Clients that leave, files that may not grow ------------------------------------------------------


def leaves(server: Served, mode: Mode, *asked: tuple[int, int]) -> None:
    """A client that asks for so many bytes from there, again and again, and takes none."""
    with server.enter(mode) as peer:
        for _ in range(40):
            for offset, length in asked:
                peer.request(Cmd.READ, offset, length)
        peer.read(1)  # it has begun to send


@pytest.mark.parametrize("mode", [Mode.SIMPLE, Mode.EXTENDED])
def test_a_client_that_closes_while_it_is_sent_to(tmp_path: Path, mode: Mode) -> None:
    """By send, by sendmsg (a chunk and a hole in turn), by send-file: SIGPIPE ends nobody."""
    path = tmp_path / "x.qcow2"
    data = {at * C: Data(NOISE[at * C : at * C + C]) for at in range(0, 16, 2)}
    packed = {at * C: Compressed(NOISE[:20_000]) for at in range(16, 24)}
    Image(size=8 * MiB, clusters={**data, **packed}).write(path)
    with served(path) as server:
        leaves(server, mode, (0, 4 * KiB))
        leaves(server, mode, (0, 4 * KiB), (100, 20 * C), (16 * C, 8 * C))
        leaves(server, mode, (0, 8 * MiB))
        with server.enter(mode) as peer:
            assert peer.pread(0, C) == NOISE[:C]


def test_a_file_that_may_not_be_so_long(tmp_path: Path) -> None:
    """RLIMIT_FSIZE is NBD_ENOSPC, and SIGXFSZ ends nobody."""
    says = "(pynbd: [^\n]*: File too large\n)+"
    with served(raw(tmp_path), "-f", "raw", says=says) as server, server.enter() as peer:
        server.limit(resource.RLIMIT_FSIZE, 8 * MiB)
        assert peer.ask(Cmd.WRITE, 9 * MiB, payload=NOISE[:C]).error == Errno.ENOSPC
        assert peer.ask(Cmd.WRITE, 8 * MiB - 512, payload=NOISE[:C]).error == Errno.ENOSPC
        assert peer.ask(Cmd.WRITE, 8 * MiB - C, payload=NOISE[:C]).error == Errno.OK
        assert peer.ask(Cmd.FLUSH).error == Errno.OK
        server.limit(resource.RLIMIT_FSIZE, -1)
        assert peer.ask(Cmd.WRITE, 9 * MiB, payload=NOISE[:C]).error == Errno.OK
        assert peer.pread(8 * MiB - C, C) == NOISE[:C]


# Memory that is a file ----------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["x.raw", "x.qcow2"])
def test_nothing_of_an_image_is_mapped(tmp_path: Path, image: str) -> None:
    """So that no file which becomes shorter can send SIGBUS."""
    path = raw(tmp_path, 2 * MiB)
    if image != path.name:
        path = tmp_path / image
        clusters = {0: Data(NOISE[:C]), C: Compressed(NOISE[:20_000])}
        backing = {"backing_file": "x.raw", "backing_format": "raw"}
        Image(size=2 * MiB, clusters=clusters, **backing).write(path)  # type: ignore[arg-type]
    contexts = ["base:allocation"]
    with served(path) as server, server.enter(contexts=contexts) as peer:
        for command, length, flags in (
            (Cmd.READ, 4 * KiB, 0),
            (Cmd.READ, 2 * MiB, 0),
            (Cmd.CACHE, 2 * MiB, 0),
            (Cmd.BLOCK_STATUS, 2 * MiB, 0),
            (Cmd.WRITE, 0, CmdFlag.FUA),
            (Cmd.WRITE_ZEROES, 4 * KiB, 0),
            (Cmd.TRIM, 2 * C, 0),
            (Cmd.FLUSH, 0, 0),
        ):
            payload = NOISE[: 3 * C] if command == Cmd.WRITE else b""
            reply = peer.ask(command, 0, length, flags=flags, payload=payload)
            assert reply.error == Errno.OK
            mapped = server.mapped()
            assert "/pynbd" in mapped or "python" in mapped
            assert str(tmp_path) not in mapped


only_one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


def image(folder: Path) -> Path:
    path = folder / "x.qcow2"
    Image(size=8 * MiB, clusters={0: Data(NOISE[:C])}).write(path)
    return path


@only_one_loop
async def test_no_memory_for_what_an_image_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be opened, and cannot be finished, which is told in a line; its file is closed."""
    path, before = image(tmp_path), len(os.listdir("/proc/self/fd"))

    def without(patched: pytest.MonkeyPatch, name: str) -> None:
        def failing(*_: object) -> None:
            raise MemoryError

        patched.setattr(os, name, failing)

    with monkeypatch.context() as patched:
        without(patched, "preadv")
        with pytest.raises(ImageError, match="cannot be opened: Cannot allocate memory"):
            await open_image(path)
    assert len(os.listdir("/proc/self/fd")) == before
    node = await open_image(path, read_only=False)
    assert await node.pwrite_batch([(C, b"new")]) == [None]
    with monkeypatch.context() as patched:
        without(patched, "pwrite")
        with pytest.raises(OSError, match="could not be finished: Cannot allocate memory"):
            await node.close()
    assert len(os.listdir("/proc/self/fd")) == before
    await sound(path)


async def test_no_memory_for_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for whose requests there is no buffer has to go; its server goes on."""
    async with await open_image(image(tmp_path)) as node:

        def take(pool: BufferPool, length: int) -> bytearray:
            raise MemoryError

        with monkeypatch.context() as without:
            without.setattr(BufferPool, "take", take)
            async with talking(node) as talk:
                await talk.client.send(talk.client.request(Cmd.READ, 0, 4 * KiB))
                with pytest.raises(ProtocolError, match="there is no memory"):
                    await talk.ends()
        async with talking(node) as talk:
            reply = await talk.client.ask(Cmd.READ, 0, 4 * KiB)
            assert reply.data(0, 4 * KiB) == NOISE[: 4 * KiB]
