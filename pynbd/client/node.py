"""NbdNode: the export of another server as a node, so that what works on images works on URIs.

``base:allocation`` is its map; without it all is data. Reads never ask for that map, so that
nothing is remembered of an export that others may change.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from itertools import cycle
from typing import Self

import numpy as np

from pynbd.block.engine import Buffer
from pynbd.block.extent import DATA, NO_HOST, ZERO, Runs
from pynbd.block.node import RESOLVE_WINDOW, BlockNode
from pynbd.client.connection import Client
from pynbd.errors import PynbdError, RequestError
from pynbd.protocol.metadata import BASE_ALLOCATION
from pynbd.protocol.uri import NbdUri
from pynbd.protocol.values import State, TransmissionFlag

# By the flags of base:allocation. A hole that does not read as zeroes has to be read.
_KIND_OF_STATE = np.full(4, DATA, np.uint8)
_KIND_OF_STATE[State.ZERO] = ZERO | DATA
_KIND_OF_STATE[State.HOLE | State.ZERO] = ZERO

# Bytes of zeroes that are written at once to a server without NBD_CMD_WRITE_ZEROES.
_ZERO_PIECE = 1 << 20

# A server may say that connections agree, and take fewer of them: the next one waits for its turn,
# which comes when the others have gone. Seconds, and times what the first one took.
_PATIENCE = 1.0
_PATIENCE_TIMES = 3


class NbdNode(BlockNode):
    """An export, by one connection or several. Its name is its URI.

    ``clients``: the connections, all to the same export, which take turns. ``block``: the minimum
    block size in bytes, of which writes and zeroes have to be multiples; reads need not. What goes
    wrong is an `OSError`, with the errno of the NBD error.
    """

    format = "raw"

    def __init__(self, uri: str, clients: Sequence[Client], *, read_only: bool) -> None:
        first = clients[0]
        self.name = uri
        self.size = first.size
        self.read_only = read_only or first.read_only
        self.window = max(self.size, RESOLVE_WINDOW)
        self.clients = clients
        self.block = first.info.block_size[0]
        self._flags = first.flags
        self._turns = cycle(clients)
        self._mapped = BASE_ALLOCATION in first.contexts

    @classmethod
    async def open(
        cls,
        uri: str | NbdUri,
        *,
        connections: int = 1,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        read_only: bool = True,
    ) -> Self:
        """Connect, up to ``connections`` times if the server says that they agree; it need not take
        so many.

        ``contexts``: of the first connection. Raises as `Client.open`, and `OSError` EROFS for an
        export that cannot be written to, unless ``read_only``.
        """
        begun = asyncio.get_running_loop().time()
        first = await Client.open(uri, contexts=contexts)
        took = asyncio.get_running_loop().time() - begun
        clients = [first]
        try:
            if first.read_only and not read_only:
                raise OSError(errno.EROFS, "the export is read-only", first.name)
            if TransmissionFlag.CAN_MULTI_CONN in first.flags and connections > 1:
                patience = max(_PATIENCE, took * _PATIENCE_TIMES)
                clients += await _further(uri, connections - 1, patience)
        except BaseException:
            await first.close()
            raise
        return cls(first.name, clients, read_only=read_only)

    # Reading

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        if not (want_zero and self._mapped):
            return Runs.single(offset, length, DATA)
        first = offset // self.block * self.block
        last = min(-(-(offset + length) // self.block) * self.block, self.size)
        with self._told():
            answers = await self.clients[0].block_status(
                first, last - first, contexts=[BASE_ALLOCATION]
            )
        status = answers[BASE_ALLOCATION]
        ends = status.lengths.cumsum() + first
        kind = _KIND_OF_STATE[(status.flags & np.uint64(3)).astype(np.intp)]
        hosts = np.full(len(ends), NO_HOST, np.int64)
        runs = Runs(first, ends, kind, hosts, np.ones(len(ends), np.int16))
        return runs.since(offset).clip(offset + length).coalesced()

    async def fetch_own(self, offset: int, view: memoryview) -> None:
        client = next(self._turns)
        head = offset % self.block
        tail = -(offset + len(view)) % self.block
        with self._told():
            if head or tail:
                whole = await client.pread(offset - head, head + len(view) + tail)
                view[:] = memoryview(whole)[head : head + len(view)]
            else:
                await client.pread_into(offset, view)

    async def prefetch(self, offset: int, length: int) -> None:
        if TransmissionFlag.SEND_CACHE in self._flags:
            with self._told():
                await next(self._turns).cache(offset, length)

    # Writing

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        if self.read_only:
            return await super().pwrite_batch(pieces)
        direct = fua and TransmissionFlag.SEND_FUA in self._flags
        under_way: list[Awaitable[None] | OSError] = []
        for offset, data in pieces:
            try:
                with self._told():
                    under_way.append(next(self._turns).start_write(offset, data, fua=direct))
            except OSError as error:
                under_way.append(error)
        errors = [await self._outcome(each) for each in under_way]
        if fua and not direct:
            flushed = await self._outcome(self.flush())
            errors = [error or flushed for error in errors]
        return errors

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool,
        fast: bool,
        fua: bool = False,
        no_hole: bool = False,
    ) -> None:
        self._check_writable()
        needed = TransmissionFlag.SEND_WRITE_ZEROES
        if fast:
            needed |= TransmissionFlag.SEND_FAST_ZERO
        if needed not in self._flags:
            if fast:
                raise OSError(errno.ENOTSUP, "the server does not offer fast zeroes", self.name)
            await self._write_zero_bytes(offset, length)
        else:
            with self._told():
                await next(self._turns).write_zeroes(
                    offset, length, no_hole=no_hole or not may_unmap, fast_zero=fast
                )
        if fua:
            await self.flush()

    async def _write_zero_bytes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, _ZERO_PIECE)))
        for at in range(offset, offset + length, _ZERO_PIECE):
            with self._told():
                await next(self._turns).pwrite(at, zeroes[: offset + length - at])

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._check_writable()
        # What it reads as is open, so that what cannot be discarded stays.
        first = -(-offset // self.block) * self.block
        last = (offset + length) // self.block * self.block
        if TransmissionFlag.SEND_TRIM in self._flags and first < last:
            with self._told():
                await next(self._turns).trim(first, last - first)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        # One flush is enough where several connections are allowed, says the specification; but
        # one that is lost must not go unnoticed.
        if TransmissionFlag.SEND_FLUSH in self._flags and not self.read_only:
            with self._told():
                await asyncio.gather(*(client.flush() for client in self.clients))

    async def close(self) -> None:
        await _close(self.clients)

    def _check_writable(self) -> None:
        if self.read_only:
            raise self._read_only()

    async def _outcome(self, under_way: Awaitable[None] | OSError) -> OSError | None:
        if isinstance(under_way, OSError):
            return under_way
        try:
            with self._told():
                await under_way
        except OSError as error:
            return error
        return None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """NBD's errors are errno values of Linux; users of nodes expect those."""
        try:
            yield
        except RequestError as error:
            said = error.message.removeprefix(f"{self.name}: ")
            raise OSError(error.error, said, self.name) from error


async def _further(uri: str | NbdUri, count: int, patience: float) -> list[Client]:
    """As many connections as there are within ``patience`` seconds, ``count`` at most."""
    opening = [asyncio.ensure_future(Client.open(uri)) for _ in range(count)]
    try:
        await asyncio.wait(opening, timeout=patience)
    except asyncio.CancelledError:
        await _close(await _opened(opening))
        raise
    return await _opened(opening)


async def _opened(opening: Sequence[asyncio.Task[Client]]) -> list[Client]:
    """Those that are open by now; the others are given up."""
    for task in opening:
        task.cancel()
    clients = []
    for outcome in await asyncio.gather(*opening, return_exceptions=True):
        if isinstance(outcome, Client):
            clients.append(outcome)
        elif not isinstance(outcome, (OSError, PynbdError, asyncio.CancelledError)):
            raise outcome
    return clients


async def _close(clients: Sequence[Client]) -> None:
    async with AsyncExitStack() as leaving:  # all of them, also if this is cancelled
        for client in clients:
            leaving.push_async_callback(client.close)
