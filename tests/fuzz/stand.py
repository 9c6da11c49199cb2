"""A server of three exports that stays between inputs: what a target says to it is on a connection
of its own, and another client stays on each export.

0 a raw image, 1 and 2 a qcow2 image on a raw one: data, zeroes, compressed clusters, a snapshot, a
bitmap; the third is read-only. What an input has written is undone before the next one.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import random
import socket
import tempfile
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine
from pynbd.block.pool import Lane
from pynbd.block.qcow2.builder import (
    Bitmap,
    Cluster,
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Zero,
)
from pynbd.errors import ProtocolError
from pynbd.protocol.uri import NbdUri
from pynbd.server.export import Export
from pynbd.server.offers import offered_contexts
from pynbd.server.serving import serve
from tests.conformance.client import Mode
from tests.server import session as sessions

T = TypeVar("T")

SIZE = 9 << 16
EXPORTS = 3
# Seconds in which all that one input asks is answered; what takes so long hangs.
_DEADLINE = 60
_MOST_PIECES = 250
# The buffers of a connection hang on so few objects that nobody comes to collect them.
_COLLECT_EVERY = 50


class _EngineInTurns(Engine):
    """Makes its calls in the loop, each in a turn of its own: in the same order every time, and
    without waiting for a thread.
    """

    def start(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(_make, future, call, args)
        return future

    def start_in_lane(self, lane: Lane, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return self.start(call, *args)


def _make(future: asyncio.Future[T], call: Callable[..., T], args: tuple[Any, ...]) -> None:
    try:
        result = call(*args)
    except Exception as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(result)


class _Place:
    """An export, in a file without a name; ``content`` is what is on its disk."""

    def __init__(self, image: bytes, form: str, *, read_only: bool) -> None:
        self._image = image
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it stays open)
        self._options: dict[str, Any] = {
            "format": form,
            "read_only": read_only,
            "cache": Cache.UNSAFE,
        }
        self._open = AsyncExitStack()
        self.name = f"/proc/self/fd/{self._file.fileno()}"
        self.content = b""

    async def open(self, engine: Engine) -> None:
        """As it was made, with its other client."""
        await self._open.aclose()
        os.pwrite(self._file.fileno(), self._image, 0)
        if os.stat(self._file.fileno()).st_size != len(self._image):
            self._file.truncate(len(self._image))
        node = await open_image(self.name, engine=engine, **self._options)
        self._open.push_async_callback(node.close)
        self.export = Export("", node, contexts=offered_contexts(node))
        talk = sessions.talking(node, export=self.export)
        self._other = (await self._open.enter_async_context(talk)).client
        self.content = await self.seen()

    async def seen(self, length: int = SIZE) -> bytes:
        """What the other client reads."""
        async with asyncio.timeout(_DEADLINE):
            reply = await self._other.ask(sessions.READ, 0, length)
        self._other.replies.clear()
        assert not reply.error
        return reply.data(0, length)

    async def close(self) -> None:
        await self._open.aclose()
        self._file.close()


class Stand(logging.Handler):
    """The server. Its log may have nothing to complain about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._loop = asyncio.new_event_loop()
        logging.getLogger("pynbd").addHandler(self)
        self.troubles: list[str] = []
        self._engine = _EngineInTurns()
        self._listening = ""
        self._talks = count(1)
        self._ends = AsyncExitStack()
        self._loop.set_exception_handler(lambda _, what: self.troubles.append(repr(what)))
        noise = random.Random(1).randbytes(SIZE)
        self._base = _Place(noise, "raw", read_only=True)
        self._places = [_Place(noise, "raw", read_only=False)]
        image = _qcow2(noise, self._base.name)
        self._places += [_Place(image, "qcow2", read_only=only) for only in (False, True)]
        for place in (self._base, *self._places):
            self._loop.run_until_complete(place.open(self._engine))

    def emit(self, record: logging.LogRecord) -> None:
        if self._loop.is_running():  # other tests of this process have troubles of their own
            self.troubles.append(self.format(record))

    def export(self, number: int) -> Export:
        return self._places[number].export

    def content(self, number: int) -> bytes:
        return self._places[number].content

    def meet(self, stream: bytes, step: int) -> bytes:
        """Connect to the read-only export, from the first byte on; the rest is as in `say`."""
        step = max(step or len(stream), len(stream) // _MOST_PIECES, 1)
        return self._loop.run_until_complete(self._meet(stream, step))

    async def _meet(self, stream: bytes, step: int) -> bytes:
        if not self._listening:
            node = self._places[-1].export.node
            server = await self._ends.enter_async_context(serve(node))
            self._listening = NbdUri.parse(server.uri).socket
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            async with asyncio.timeout(_DEADLINE):
                await self._loop.sock_connect(sock, self._listening)
                return await self._converse(sock, stream, step)

    async def _converse(self, sock: socket.socket, stream: bytes, step: int) -> bytes:
        """What the server says until it hangs up."""
        async with asyncio.TaskGroup() as both:
            hearing = both.create_task(_hear(self._loop, sock))
            both.create_task(_say(self._loop, sock, stream, step))
        return hearing.result()

    def seen(self, number: int, length: int = SIZE) -> bytes:
        """The first bytes of an export, as its other client reads them."""
        return self._loop.run_until_complete(self._places[number].seen(length))

    def undo(self, number: int) -> None:
        """All that was written."""
        self._loop.run_until_complete(self._places[number].open(self._engine))

    def say(
        self, number: int, mode: Mode, contexts: Collection[str], stream: bytes, step: int
    ) -> tuple[bytes, ProtocolError | None]:
        """Say all of ``stream``, and then no more: ``step`` bytes at a time, or more if it is long;
        0 is all at once.

        Returns what the server said until it hung up, and why it did if it was the client's fault.
        """
        if next(self._talks) % _COLLECT_EVERY == 0:
            gc.collect()
        step = max(step or len(stream), len(stream) // _MOST_PIECES, 1)
        talk = self._talk(self.export(number), mode, contexts, stream, step)
        return self._loop.run_until_complete(talk)

    async def _talk(
        self, export: Export, mode: Mode, contexts: Collection[str], stream: bytes, step: int
    ) -> tuple[bytes, ProtocolError | None]:
        selected = {name: export.contexts[name] for name in contexts}
        dialect = sessions.Mode(mode.value)
        async with sessions.talking(export.node, dialect, contexts=selected) as talk:
            async with asyncio.timeout(_DEADLINE):
                said = await self._converse(talk.client.sock, stream, step)
            try:
                await talk.ends()
            except ProtocolError as error:
                return said, error
            return said, None

    def end(self) -> None:
        self._loop.run_until_complete(self._ends.aclose())
        logging.getLogger("pynbd").removeHandler(self)
        for place in (*self._places, self._base):
            self._loop.run_until_complete(place.close())
        self._engine.close()
        self._loop.close()


@cache
def stand() -> Stand:
    """The one of this process."""
    it = Stand()
    atexit.register(it.end)
    return it


async def _say(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, stream: bytes, step: int
) -> None:
    with suppress(ConnectionError):  # it need not listen to the end
        for at in range(0, len(stream), step):
            await loop.sock_sendall(sock, stream[at : at + step])
            await asyncio.sleep(0)
        sock.shutdown(socket.SHUT_WR)


async def _hear(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    said = b""
    with suppress(ConnectionResetError):  # it hung up with bytes of ours unread
        while part := await loop.sock_recv(sock, 1 << 18):
            said += part
    return said


def _qcow2(noise: bytes, backing: str) -> bytes:
    clusters: dict[int, Cluster] = {
        0: Data(noise[:65536]),
        1 << 16: Zero(),
        2 << 16: Compressed(noise[:20000]),
        3 << 16: Compressed(noise[:30000]),
        4 << 16: Zero(preallocated=True),
        5 << 16: Data(noise[1000:66536]),
    }
    image = Image(
        size=SIZE,
        clusters=clusters,
        backing_file=backing,
        backing_format="raw",
        snapshots=[InternalSnapshot("s", {0: clusters[0], 2 << 16: clusters[2 << 16]})],
        bitmaps=[Bitmap("b", 65536, dirty=[(1 << 16, 3 << 16)])],
    )
    with tempfile.TemporaryDirectory(prefix="pynbd-fuzz-") as folder:
        image.write(Path(folder) / "x.qcow2")
        return (Path(folder) / "x.qcow2").read_bytes()
