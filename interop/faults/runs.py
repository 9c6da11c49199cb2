"""One run: an image is opened, asked and closed while a call of its host fails; and the judgement.

The rules, which are those of the NBD specification ("Error values", "Request types") and of
docs/design.md:

1. Only a request in whose time the fault was met may fail, and with the error that belongs to it;
   none if the fault is `Fault.invisible`. A read that succeeds has the right bytes.
2. After a failed fdatasync every FLUSH and WRITE fails with NBD_EIO.
3. A change that has failed has happened or not, byte by byte; one that was answered with success
   has happened.
4. An image that cannot be opened, or finished, is told in one line that names a file.
5. What is left behind opens again and is consistent (after its repair, if it is marked dirty): no
   corruption, and leaked clusters only after a fault. What was flushed is there; if it was closed
   well, all that was answered is.
6. No descriptor, thread or task stays, and the log knows no defect.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interop import peers
from interop.faults.calls import FAULTS, NOTHING, Fault, Host, installed
from interop.faults.scenarios import Ask, Group, Place
from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.format import Incompatible
from pynbd.errors import ImageError
from pynbd.server.offers import offered_contexts
from tests.block.qcow2.writing import header_of, report_on
from tests.block.reading import contents
from tests.server.session import (
    BLOCK_STATUS,
    CACHE,
    EIO,
    ENOSPC,
    EPERM,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    Client,
    Mode,
    Reply,
    talking,
)

ENOMEM, EINVAL = 12, 22
# The NBD errors of host errors; what stands in none of them is EINVAL.
_ERRORS = {
    "EIO": EIO,
    "ENOMEM": ENOMEM,
    "ENOSPC": ENOSPC,
    "EDQUOT": ENOSPC,
    "EFBIG": ENOSPC,
    "EPERM": EPERM,
    "EACCES": EPERM,
}
_ZERO = 2  # NBD_STATE_ZERO
_LIMIT = 20.0  # seconds, of which a run takes a few hundredths

Bytes = NDArray[np.uint8]


class Log(logging.Handler):
    """What was logged, and what the loop was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.lines.append(f"a defect in the loop: {context}")


class Run:
    """A run in ``place`` with ``fault``, or with none: then ``host`` has counted the calls.

    ``outcome``: "not met" (the fault), "invisible", "refused" (to be opened), "failed" (requests),
    "unfinished" (at its end), or, where an image ended the connection, "disconnected".
    """

    def __init__(self, place: Place, content: bytes, fault: Fault | None) -> None:
        self.place = place
        self.host = Host(fault)
        self.fault = fault
        self.outcome = "invisible"
        self._disk = _array(content)
        self._since_flush = [self._disk.copy()]
        self._sync_failed = False

    @property
    def _to_blame(self) -> bool:
        """Whether the fault was met, and may be seen."""
        return bool(self.host.met and self.fault and not self.fault.invisible)

    async def run(self) -> str:
        """The outcome; raises AssertionError."""
        self.place.restore()
        before = _possessions()
        log = Log()
        logger, loop = logging.getLogger("pynbd"), asyncio.get_running_loop()
        logger.addHandler(log)
        logger.propagate = False
        loop.set_exception_handler(log.unhandled)
        try:
            with installed(self.host):
                async with asyncio.timeout(_LIMIT):
                    await self._open_and_serve()
        finally:
            logger.removeHandler(log)
            logger.propagate = True
            loop.set_exception_handler(None)
        assert not [line for line in log.lines if "defect" in line], log.lines
        assert _possessions() == before
        if self.place.scenario.writes:
            await self._judge_what_is_left()
        if self.fault and not self.host.met:
            return "not met"
        return self.outcome

    async def _open_and_serve(self) -> None:
        scenario = self.place.scenario
        try:
            node = await open_image(self.place.path, **scenario.options)
        except (ImageError, OSError) as error:
            assert self._to_blame
            self.outcome = "refused"
            self._check_line(error)
            return
        self.host.mend()
        try:
            contexts = offered_contexts(node)
            async with talking(node, scenario.mode, contexts=contexts) as talk:
                for group in scenario.asked:
                    if scenario.mode is Mode.SIMPLE and group[0].command == BLOCK_STATUS:
                        continue  # it has no contexts
                    if not await self._ask(talk.client, group):
                        break
        except BaseException:
            self.host.fault = None
            with suppress(OSError):
                await node.close()
            raise
        await self._close(node)

    async def _close(self, node: BlockNode) -> None:
        met = self.host.met
        try:
            await node.close()
        except OSError as error:
            self.outcome = "unfinished"
            self._check_line(error)
            if not self._sync_failed and not (self.host.met > met and self._to_blame):
                raise
        else:
            self._since_flush = [self._disk]  # all of it has to be there

    def _check_line(self, error: Exception) -> None:
        text = f"{error.filename}: {error}" if isinstance(error, OSError) else str(error)
        assert str(self.place.folder) in text, error
        assert "\n" not in text

    async def _ask(self, client: Client, group: Group) -> bool:
        """Ask, judge the answers, and look what failed changes have done. False: it is over."""
        met, syncs = self.host.met, self._sync_failed
        requests = [
            client.request(command, offset, length, flags=flags, payload=data)
            for command, offset, length, flags, data in group
        ]
        cookies = list(client._asked)
        await client.send(*requests)
        try:
            replies = [await client.reply(cookie) for cookie in cookies]
        except EOFError:
            assert client.mode is Mode.SIMPLE  # which cannot say it in the middle of a reply
            assert self.fault
            assert self.fault.call == "sendfile"
            self.outcome = "disconnected"
            return False
        here = self.host.met > met
        self.host.mend()
        self._sync_failed |= here and self.fault is not None and self.fault.call == "fdatasync"
        for ask, reply in zip(group, replies, strict=True):
            if reply.error:
                self.outcome = "failed"
                assert reply.error in self._errors(ask, here=here), (ask[:4], reply)
            else:
                flushes = ask.command == FLUSH or ask.flags & FUA
                # Where all is written through, what is punched after a commit is flushed, too.
                lost = syncs or (self._sync_failed and not self.place.written_through)
                assert not (lost and flushes), (ask[:4], "in spite of a failed fdatasync")
                assert not (syncs and ask.command == WRITE), (ask[:4], "after a failed fdatasync")
            self._judge(ask, reply)
        for ask, reply in zip(group, replies, strict=True):
            if ask.command == TRIM or (reply.error and ask.command not in _READING):
                await self._settle(client, ask)
        flushed = any(ask.command == FLUSH or ask.flags & FUA for ask in group)
        if flushed and not any(reply.error for reply in replies):
            self._since_flush.clear()
        self._since_flush.append(self._disk.copy())
        return True

    def _errors(self, ask: Ask, *, here: bool) -> set[int]:
        """The errors that are right for a request."""
        allowed = set()
        if self._sync_failed and ask.command not in _READING:
            allowed.add(EIO)
        if here and self.fault and self._to_blame:
            call, outcome = self.fault.call, self.fault.outcome
            if outcome == NOTHING:
                allowed.add(ENOSPC if call in ("pwrite", "pwritev") else EIO)
            else:
                allowed.add(_ERRORS.get(outcome, EINVAL))
            if call == "sendfile":
                allowed = {EIO}
        return allowed

    def _judge(self, ask: Ask, reply: Reply) -> None:
        if reply.error or ask.command in (CACHE, TRIM):
            return
        if ask.command == READ:
            self._judge_bytes(ask, reply, self._disk[_range(ask)])
        elif ask.command == BLOCK_STATUS:
            at = ask.offset
            for length, flags in reply.status[0]:
                if flags & _ZERO:
                    assert not self._disk[at : at + length].any(), f"not zero from {at:#x}"
                at += length
        else:
            self._disk[_range(ask)] = _content(ask)

    def _judge_bytes(self, ask: Ask, reply: Reply, *wanted: Any) -> Bytes:
        """Each byte has to be one of those ``wanted``."""
        got = _array(reply.data(ask.offset, ask.end - ask.offset))
        right = np.logical_or.reduce([got == one for one in wanted])
        assert right.all(), f"{ask[:4]}: other bytes from {ask.offset + int(np.argmin(right)):#x}"
        return got

    async def _settle(self, client: Client, ask: Ask) -> None:
        """What a change has left that failed, or was only a hint. It is read by the client, which
        meets no fault any more.
        """
        reply = await client.ask(READ, ask.offset, ask.end - ask.offset)
        assert not reply.error
        either = self._disk[_range(ask)], _content(ask)
        self._disk[_range(ask)] = self._judge_bytes(ask, reply, *either)

    async def _judge_what_is_left(self) -> None:
        path, qcow2 = self.place.path, _format(self.place) == "qcow2"
        if qcow2:
            features = (await header_of(path)).incompatible
            assert Incompatible.CORRUPT not in features
            if Incompatible.DIRTY in features:
                await (await open_image(path, read_only=False)).close()
        async with await open_image(path, format=_format(self.place)) as node:
            got = _array(await contents(node))
        right = np.logical_or.reduce([got == one for one in self._since_flush])
        assert right.all(), f"other bytes from {int(np.argmin(right)):#x} on"
        if qcow2:
            report = await report_on(path)
            assert not report.corruptions, report.findings
            assert not report.check_errors, report.findings
            assert self.host.met or not report.leaks

    def ask_qemu(self) -> None:
        """What `qemu-img check` says of what is left: nothing, or leaked clusters."""
        place = self.place
        done = peers.run("qemu-img", "check", "-q", place.path, check=False, cwd=place.folder)
        assert done.returncode in (0, 3), done.stdout + done.stderr


_READING = (READ, CACHE, BLOCK_STATUS)


def _format(place: Place) -> str:
    return place.path.suffix[1:]


def _range(ask: Ask) -> slice:
    return slice(ask.offset, ask.end)


def _array(data: bytes | bytearray) -> Bytes:
    return np.frombuffer(data, np.uint8).copy()


def _content(ask: Ask) -> Any:
    return _array(ask.data) if ask.data else 0


def _possessions() -> tuple[Counter[str], int, int]:
    """What the process has open, its threads, and its tasks."""
    open_now: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one of the folder itself
            open_now[os.readlink(f"/proc/self/fd/{name}")] += 1
    return open_now, threading.active_count(), len(asyncio.all_tasks())


async def content_of(place: Place) -> bytes:
    """What the disk of a place holds."""
    options = {**place.scenario.options, "read_only": True}
    async with await open_image(place.path, **options) as node:
        return await contents(node)


async def plan(place: Place, content: bytes) -> list[Fault]:
    """Every call of a scenario in turn, with everything that can happen to it, once or lasting.
    They are counted in a run without any.
    """
    well = Run(place, content, None)
    await well.run()
    return [
        Fault(call, number, outcome, lasting)
        for call, count in sorted(well.host.counts.items())
        for number in range(1, count + 1)
        for outcome in FAULTS[call]
        if not (outcome == NOTHING and call in ("pread", "preadv") and not place.may_end_early)
        for lasting in (False, True)
    ]
