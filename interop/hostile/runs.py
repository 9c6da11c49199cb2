"""One run: a server, its crowd, polite clients before and in it, and what the server needs for it.

The image is of qcow2, and half of it compressed: what is read of that is in the server's memory
until it is taken.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from interop import peers
from interop.hostile.crowd import HOSTILE, IDLE, Crowd

SIZE = 64 << 20
_MIB = 1 << 20
_PATTERN = 4 << 20
_COMMON = SIZE * 3 // 4  # of this much nothing is written
# Seconds for anything that has to come about; only a hang takes longer.
DEADLINE = 900.0
LIMITS = {
    "--handshake-limit": "4",
    "--stall-limit": "4",
    "--max-memory": "128M",
}

# The polite client: reads, writes, flushes and maps, alone and many at a time, and looks at all
# that it gets. It writes where nobody else does.
POLITE = """
import random
with open({image!r}, "rb") as file:
    pattern = file.read()
chance, common, own = random.Random({seed}), {common}, {own}
h.add_meta_context("base:allocation")
h.connect_uri({uri!r})
ended = []
def over(number):
    def callback(error):
        assert not error.value
        ended.append(number)
        return 1
    return callback
def expected(offset, length):
    whole = offset % len(pattern)
    return (pattern * (2 + length // len(pattern)))[whole : whole + length]
for turn in range({turns}):
    length = chance.choice((512, 4096, 70_000, 1 << 20, 5 << 20))
    offset = chance.randrange(common - length)
    assert h.pread(length, offset) == expected(offset, length)
    data = chance.randbytes(chance.choice((512, 4096, 200_000, 2 << 20)))
    h.pwrite(data, own)
    assert h.pread(len(data), own) == data
    buffers = {{}}
    for number in range(16):
        offset = chance.randrange(common - 4096)
        buffer = nbd.Buffer(4096)
        h.aio_pread(buffer, offset, completion=over((turn, number)))
        buffers[turn, number] = offset, buffer
    while h.aio_in_flight():
        h.poll(-1)
    assert sorted(ended) == sorted(buffers)
    for offset, buffer in buffers.values():
        assert buffer.to_bytearray() == expected(offset, 4096)
    ended.clear()
    extents = []
    h.block_status(1 << 20, 0, lambda *said: extents.append(said))
    assert extents
    h.flush()
h.shutdown()
print("served", turn + 1)
"""


@dataclass(frozen=True)
class Figures:
    """What a run has seen: memory in bytes, times in seconds."""

    came: Counter[str]
    ended: Counter[str]
    memory_at_rest: int
    memory_at_most: int
    descriptors_at_rest: int
    descriptors_at_most: int
    descriptors_afterwards: int
    polite: int
    seconds: float
    seconds_to_end: float

    def __str__(self) -> str:
        memory = f"{self.memory_at_rest >> 20} to {self.memory_at_most >> 20} MiB"
        descriptors = f"{self.descriptors_at_rest}, {self.descriptors_at_most} at most, "
        descriptors += f"{self.descriptors_afterwards} afterwards"
        return (
            f"{self.came.total()} connections, of which the server ended {self.ended.total()};"
            f" memory {memory}; descriptors {descriptors};"
            f" {self.polite} rounds of polite clients served; {self.seconds:.0f} s,"
            f" ended {self.seconds_to_end:.1f} s after SIGTERM"
        )


def make_image(folder: Path, seed: int) -> tuple[Path, Path]:
    """The image, and the bytes that its first three quarters repeat."""
    pattern, raw, image = folder / "pattern", folder / "raw", folder / "image.qcow2"
    half = random.Random(seed).randbytes(_PATTERN // 2)
    pattern.write_bytes(b"".join(bytes([byte, 0]) for byte in half))
    raw.write_bytes(pattern.read_bytes() * (SIZE // _PATTERN))
    peers.run("qemu-img", "convert", "-c", "-O", "qcow2", raw, image)
    raw.unlink()
    return image, pattern


class Watched:
    """A server, and what the kernel tells of its process."""

    def __init__(self, process: subprocess.Popen[str], uri: str) -> None:
        self.process = process
        self.uri = uri
        self._folder = Path(f"/proc/{process.pid}")

    def memory(self, field: str = "VmRSS") -> int:
        for line in (self._folder / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) << 10
        raise LookupError(field)

    def descriptors(self) -> int:
        return len(os.listdir(self._folder / "fd"))


@contextmanager
def serving(image: Path, transport: str, errors: IO[bytes]) -> Iterator[Watched]:
    with peers.socket_path() as path:
        where = ["-k", str(path)] if transport == "unix" else ["-b", "127.0.0.1", "-p", "0"]
        limits = [word for option in LIMITS.items() for word in option]
        line = [sys.executable, "-m", "pynbd", "serve", *where, *limits, str(image)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                assert process.stdout is not None
                yield Watched(process, process.stdout.readline().strip())
            finally:
                process.kill()


async def run(
    transport: str, folder: Path, idle: int, hostile: int, turns: int, seed: int
) -> Figures:
    """``idle`` connections, every other one negotiated, and ``hostile`` ones; three polite clients,
    one of them there before. AssertionError if anything is not as it is promised.
    """
    image, pattern = make_image(folder, seed)
    with tempfile.TemporaryFile() as errors, serving(image, transport, errors) as server:
        figures = await _run(server, transport, pattern, idle, hostile, turns, seed)
        errors.seek(0)
        said = errors.read().decode()
        assert said == "", said
    peers.run("qemu-img", "check", image)
    return figures


async def _run(
    server: Watched,
    transport: str,
    pattern: Path,
    idle: int,
    hostile: int,
    turns: int,
    seed: int,
) -> Figures:
    started = time.monotonic()

    def polite(number: int) -> asyncio.Task[int]:
        script = POLITE.format(
            image=str(pattern),
            uri=server.uri,
            seed=seed * 10 + number,
            common=_COMMON,
            own=_COMMON + number * 4 * _MIB,
            turns=turns,
        )
        return asyncio.create_task(_polite(script))

    assert await polite(0) == turns
    memory, descriptors = server.memory(), server.descriptors()
    crowd = Crowd(_address(server.uri, transport), seed)
    most = 0
    try:
        clients = [polite(0)]
        crowd.gather(IDLE, idle, "127.0.0.2")
        crowd.gather(HOSTILE, hostile, "127.0.0.3")
        await _eventually(lambda: crowd.came.total() >= idle + hostile, "the crowd has not come")
        clients += [polite(1), polite(2)]
        waiting = asyncio.gather(*clients)
        async with asyncio.timeout(DEADLINE):
            while not waiting.done():
                most = max(most, server.descriptors())
                await asyncio.wait([waiting], timeout=0.25)
        served = sum(await waiting)
        assert served == 3 * turns
    finally:
        await crowd.disperse()
    peak = server.memory("VmHWM")
    # What nobody takes is given up after the limit, and nothing is left.
    await _eventually(lambda: server.descriptors() <= descriptors, "descriptors are left")
    afterwards = server.descriptors()
    # It ends in time, too, while they are there.
    again = Crowd(_address(server.uri, transport), seed + 1)
    try:
        again.gather(IDLE, idle, "127.0.0.2")
        again.gather(HOSTILE, hostile, "127.0.0.3")
        await _eventually(lambda: again.came.total() >= idle + hostile, "the crowd has not come")
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(server.process.wait, DEADLINE)
        ended = time.monotonic() - asked
    finally:
        await again.disperse()
    assert status == 0
    return Figures(
        came=crowd.came,
        ended=crowd.ended,
        memory_at_rest=memory,
        memory_at_most=peak,
        descriptors_at_rest=descriptors,
        descriptors_at_most=most,
        descriptors_afterwards=afterwards,
        polite=served,
        seconds=time.monotonic() - started,
        seconds_to_end=ended,
    )


async def _polite(script: str) -> int:
    """How many rounds it was served."""
    said = await asyncio.to_thread(peers.nbdsh, script, timeout=DEADLINE)
    word, _, rounds = said.strip().partition(" ")
    assert word == "served"
    return int(rounds)


async def _eventually(condition: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, otherwise
        await asyncio.sleep(0.05)


def _address(uri: str, transport: str) -> str | tuple[str, int]:
    if transport == "unix":
        return uri.partition("?socket=")[2]
    host, _, port = uri.removeprefix("nbd://").rstrip("/").partition(":")
    return host, int(port)
