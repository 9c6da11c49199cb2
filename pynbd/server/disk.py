"""`Disk`: an export of one's own, in Python; `DiskNode`: the same as a node of the server.

A subclass overrides what its disk can, and that is what clients are told (transmission flags,
metadata contexts). The rules:

1. Every method is ``async def`` and runs in the loop of the server: what blocks there holds every
   client up, so that blocking work belongs into ``await asyncio.to_thread(...)``.
2. Calls overlap: many requests of many clients are under way at a time, and NBD orders nothing but
   a flush after the writes that were answered before it. Who needs order has an `asyncio.Lock`.
3. Ranges are inside the size, and at least one byte long.
4. An ``OSError`` with an errno becomes its NBD error. Any other exception is a defect of the disk:
   its traceback is logged, once for each place that raises, and the client gets NBD_EIO.
5. Any call may be cancelled: a read when its client has gone, all of them when the server has to
   end.
"""

# ruff: noqa: B027 (what a subclass does not override does nothing, and succeeds)

from __future__ import annotations

import asyncio
import errno
import inspect
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import islice
from operator import index
from typing import ParamSpec, TypeAlias, TypeVar

import numpy as np

from pynbd.block.engine import Buffer
from pynbd.block.extent import DATA, NO_HOST, Runs
from pynbd.block.node import PREFETCH_MAX, BlockNode
from pynbd.block.steps import together
from pynbd.errors import UsageError
from pynbd.protocol.metadata import BASE_ALLOCATION
from pynbd.protocol.strings import check_string
from pynbd.protocol.values import MAX_EXPORT_SIZE, MAX_PAYLOAD, State
from pynbd.server.contexts import AllocationContext, Context, Ends, States
from pynbd.server.troubles import TroubleLog

P = ParamSpec("P")
T = TypeVar("T")

StatusRows: TypeAlias = Iterable[tuple[int, int]]
"""Consecutive extents: (length in bytes, flags)."""
StatusMethod: TypeAlias = Callable[[int, int], Awaitable[StatusRows]]
"""Asked with (offset, length); answers for a part of it from its beginning, or for all."""

# What of one answer is looked at, about two milliseconds' worth; clients ask again for the rest.
ROWS_AT_ONCE = 1 << 13
# Zeroes that are written as data, at a time.
_ZEROES = bytes(1 << 20)
# The flags of an extent in a structured reply ("NBD_REPLY_TYPE_BLOCK_STATUS").
_FLAGS_MAX = (1 << 32) - 1

_METHODS = ("pread", "pwrite", "flush", "discard", "write_zeroes", "cache", "map", "close")


class Disk(ABC):
    """A disk whose bytes come from Python. A subclass has a ``size`` and `pread`; the other methods
    are for what it can besides. All offsets and lengths are in bytes.
    """

    size: int
    """0 to 2**63 - 1; asked for once, when the disk is exported."""

    block_size: int = 4096
    """What requests had better be multiples of, a power of two from 512 to 32 MiB. It is a wish:
    clients may ask for any bytes.
    """

    @abstractmethod
    async def pread(self, offset: int, length: int) -> Buffer:
        """The ``length`` bytes from ``offset``, at most 32 MiB: `bytes` or what is like them."""

    async def pwrite(self, offset: int, data: bytes) -> None:
        """Write ``data``, at most 32 MiB. Without this method the export is read-only."""
        raise OSError(errno.EROFS, "the disk is read-only")

    async def flush(self) -> None:
        """Bring onto stable storage what was written before. Without this method, what `pwrite` has
        done is as stable as it gets. It is called after a write with NBD_CMD_FLAG_FUA, too.
        """

    async def discard(self, offset: int, length: int) -> None:
        """Nobody needs these bytes any more, whatever they read as from now on. Any length."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make bytes read as zeroes, faster than by writing them; a hole if ``may_unmap``. Any
        length.

        Without this method, or where it raises ``OSError`` EOPNOTSUPP, zeroes are written with
        `pwrite`; a client that wants them fast or not at all then gets NBD_ENOTSUP.
        """
        raise OSError(errno.EOPNOTSUPP, "zeroes are not written faster than data")

    async def cache(self, offset: int, length: int) -> None:
        """These bytes, at most 32 MiB, will be read soon."""

    async def map(self, offset: int, length: int) -> StatusRows:
        """``base:allocation``: (length, flags of `State`) of consecutive extents from ``offset``:
        0 for data, ``State.HOLE | State.ZERO`` for a hole. Without this method all is data.

        An answer may be shorter than ``length``, which is of any size, but not empty; what is too
        long is cut.
        """
        return [(length, 0)]

    def contexts(self) -> Mapping[str, StatusMethod]:
        """Metadata contexts of its own, by name: ``{"x-heat:reads": self.heat}``.

        A name is ``namespace:leaf``, at most 4096 bytes of UTF-8; ``x-`` begins a namespace that is
        nobody's. A method is asked and answers as `map`, with flags of its own, 32 bits of them.
        Asked for once, when the disk is exported.
        """
        return {}

    async def close(self) -> None:
        """The export has ended; nothing is under way any more."""


class DiskNode(BlockNode):
    """A `Disk` as the server sees it. Raises `UsageError` for a disk that cannot be exported.

    ``contexts``: all on offer, by name, in the order of their ids.
    """

    format = "python"

    def __init__(self, disk: Disk, *, read_only: bool = False) -> None:
        self.name = type(disk).__qualname__
        for method in _METHODS:
            if not inspect.iscoroutinefunction(inspect.unwrap(getattr(disk, method))):
                raise UsageError(f"{self.name}.{method}: it has to be an `async def` method")
        self._disk = disk
        self._defects = TroubleLog()
        self.size = self._number("size", 0, MAX_EXPORT_SIZE)
        self.preferred_block_size = self._number("block_size", 512, MAX_PAYLOAD)
        if self.preferred_block_size.bit_count() != 1:
            raise UsageError(f"{self.name}.block_size: a power of two is expected")
        self.read_only = read_only or not self._can("pwrite")
        self.can_discard = self._can("discard")
        self.can_prefetch = self._can("cache")
        # Data from end to end, in one window: a read, however long, is one call.
        self.window = max(self.size, 1)
        self.contexts: dict[str, Context] = {BASE_ALLOCATION: AllocationContext()}
        if self._can("map"):
            every = int(State.HOLE | State.ZERO)
            self.contexts[BASE_ALLOCATION] = _MethodContext(self, "map", disk.map, every)
        for name, answer in disk.contexts().items():
            self._check_context(name, answer)
            self.contexts[name] = _MethodContext(self, name, answer, _FLAGS_MAX)

    def _can(self, method: str) -> bool:
        """Whether the subclass has its own ``method``."""
        return getattr(type(self._disk), method) is not getattr(Disk, method)

    def _number(self, name: str, least: int, most: int) -> int:
        value = getattr(self._disk, name, None)
        if not isinstance(value, int) or not least <= value <= most:
            raise UsageError(
                f"{self.name}.{name}: {value!r} is not a whole number from {least} to {most}"
            )
        return value

    def _check_context(self, name: str, answer: StatusMethod) -> None:
        if not isinstance(name, str):
            raise UsageError(f"{self.name}.contexts: {name!r} is not the name of a context")
        check_string(f"{self.name}.contexts: {name[:32]!r}", name)
        namespace, colon, leaf = name.partition(":")
        if not (namespace and colon and leaf):
            raise UsageError(f"{self.name}.contexts: {name!r} is not of the form namespace:leaf")
        if namespace == "base":
            raise UsageError(f"{self.name}.contexts: {name!r}: base:allocation is made by `map`")
        if not callable(answer):
            raise UsageError(f"{self.name}.contexts: {name!r}: an async method is expected")

    async def ask(
        self, name: str, method: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What ``method`` answers, which is or calls the disk's ``name``; rule 4 for what it
        raises.

        It does not run in the first step of a request (`pynbd.block.steps`), where there is no
        Task, and so no `asyncio.timeout`.
        """
        await asyncio.sleep(0)
        try:
            return await method(*args, **kwargs)
        except OSError as error:
            if error.errno is not None:
                raise
            defect: BaseException = error  # as TimeoutError often is
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            defect = error  # nobody cancelled this request: something that it awaited was
        except Exception as error:
            defect = error
        *_, place = traceback.extract_tb(defect.__traceback__)
        kind = name, type(defect), place.filename, place.lineno
        trace = "".join(traceback.format_exception(defect)).rstrip()
        self._defects.tell(f"{self.name}: a defect in {name}:\n{trace}", kind, 0)
        what = f"{name} raised {type(defect).__name__}"
        raise OSError(errno.EIO, what, self.name) from defect

    # Reading

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        return Runs.single(offset, length, DATA, NO_HOST)

    async def fetch_own(self, offset: int, view: memoryview) -> None:
        await self.ask("pread", self._pread, offset, view)

    async def _pread(self, offset: int, view: memoryview) -> None:
        data = await self._disk.pread(offset, len(view))
        try:
            got = memoryview(data).cast("B")
        except TypeError:
            what = f"pread returned {type(data).__name__}, which is not like bytes"
            raise OSError(errno.EIO, what, self.name) from None
        if len(got) != len(view):
            what = f"pread returned {len(got)} bytes in place of {len(view)}"
            raise OSError(errno.EIO, what, self.name)
        view[:] = got

    async def prefetch(self, offset: int, length: int) -> None:
        if self.can_prefetch:
            await self.ask("cache", self._disk.cache, offset, min(length, PREFETCH_MAX))

    # Writing

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        errors = await together(self._attempt(offset, bytes(data)) for offset, data in pieces)
        if fua:
            await self.flush()
        return errors

    async def _attempt(self, offset: int, data: bytes) -> OSError | None:
        try:
            await self._pwrite(offset, data)
        except OSError as error:
            return error
        return None

    async def _pwrite(self, offset: int, data: bytes) -> None:
        await self.ask("pwrite", self._disk.pwrite, offset, data)

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
        try:
            zeroing, may_unmap = self._disk.write_zeroes, may_unmap and not no_hole
            await self.ask("write_zeroes", zeroing, offset, length, may_unmap=may_unmap)
        except OSError as error:
            if fast or error.errno != errno.EOPNOTSUPP:
                raise
            for at in range(offset, offset + length, len(_ZEROES)):
                await self._pwrite(at, _ZEROES[: offset + length - at])
        if fua:
            await self.flush()

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        if self.can_discard:
            await self.ask("discard", self._disk.discard, offset, length)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        if not self.read_only:
            await self.ask("flush", self._disk.flush)

    async def close(self) -> None:
        await self.ask("close", self._disk.close)


class _MethodContext(Context):
    """A metadata context that a method of the disk answers. ``mask``: the flags that it has."""

    needs_map = False

    def __init__(self, node: DiskNode, name: str, method: StatusMethod, mask: int) -> None:
        self._node = node
        self._name = name
        self._method = method
        self._mask = mask

    async def states(
        self, offset: int, end: int, runs: Runs | None, limit: int
    ) -> tuple[Ends, States]:
        return await self._node.ask(self._name, self._states, offset, end)

    async def _states(self, offset: int, end: int) -> tuple[Ends, States]:
        ends: list[int] = []
        states: list[int] = []
        reached = offset
        rows = await self._method(offset, end - offset)
        for length, flags in islice(map(_whole_numbers, rows), ROWS_AT_ONCE):
            if length < 1 or flags & ~self._mask:
                what = f"{self._name}: an extent of {length} bytes with the flags {flags:#x}"
                raise OSError(errno.EIO, what, self._node.name)
            reached = min(reached + length, end)
            ends.append(reached)
            states.append(flags)
            if reached == end:
                break
        if not ends:
            raise OSError(errno.EIO, f"{self._name}: an answer without extents", self._node.name)
        return np.array(ends, np.int64), np.array(states, np.int64)


def _whole_numbers(row: tuple[int, int]) -> tuple[int, int]:
    length, flags = row
    return int(index(length)), int(index(flags))
