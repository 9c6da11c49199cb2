"""The commands of the transmission phase ("Request types" in the NBD specification).

`CommandRule` says in one row what a command may carry; `Commands.validate` is the one place that
enforces it. Each command is a coroutine that returns the pieces of its whole reply, and suspends
only where the disk does. A write is served together with the other writes of its batch.

The order of the checks: is the command known, may it be done at all (EPERM), are its flags legal,
does it lie inside the export.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, ClassVar

from pynbd.block.engine import Buffer
from pynbd.block.extent import COMPRESSED, ZERO, Extent
from pynbd.block.node import BlockNode
from pynbd.block.steps import together
from pynbd.errors import RequestError
from pynbd.protocol.handshake import Session
from pynbd.protocol.metadata import decode_filter, longest_filter
from pynbd.protocol.transmission import Dialect, Request
from pynbd.protocol.values import MAX_PAYLOAD, Command, CommandFlag, Error
from pynbd.server.contexts import block_status
from pynbd.server.export import Export
from pynbd.server.stream import FilePiece, Piece, ReplyEnd
from pynbd.server.zeroes import DetectZeroes, pwrite_detecting

log = logging.getLogger("pynbd")

# From this length on the kernel is asked to send file bytes itself, instead of copying them through
# us.
SEND_FILE_MIN = 1 << 16
# Extents of one read that are fetched in one turn of the loop.
EXTENTS_AT_ONCE = 64

_DF = int(CommandFlag.DF)
_FUA = int(CommandFlag.FUA)
_NO_HOLE = int(CommandFlag.NO_HOLE)
_REQ_ONE = int(CommandFlag.REQ_ONE)
_FAST_ZERO = int(CommandFlag.FAST_ZERO)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)


@dataclass(frozen=True, slots=True)
class CommandRule:
    """What a command may carry. ``flags``: legal in every dialect; ``structured``, ``extended``:
    there too.

    ``beyond_end``: the error of a request that leaves the export. ``limited``: its length is a
    payload's.
    """

    flags: int = _FUA
    structured: int = 0
    extended: int = 0
    writes: bool = False
    beyond_end: Error = Error.EINVAL
    limited: bool = False


RULES = {
    Command.READ: CommandRule(structured=_DF, limited=True),
    Command.WRITE: CommandRule(
        extended=_PAYLOAD_LEN, writes=True, beyond_end=Error.ENOSPC, limited=True
    ),
    Command.FLUSH: CommandRule(),
    Command.TRIM: CommandRule(writes=True),
    Command.CACHE: CommandRule(),
    Command.WRITE_ZEROES: CommandRule(
        flags=_FUA | _NO_HOLE | _FAST_ZERO, writes=True, beyond_end=Error.ENOSPC
    ),
    Command.BLOCK_STATUS: CommandRule(flags=_FUA | _REQ_ONE, extended=_PAYLOAD_LEN),
}

_ERROR_OF_ERRNO = {
    errno.EPERM: Error.EPERM,
    errno.EACCES: Error.EPERM,
    errno.EROFS: Error.EPERM,
    errno.EIO: Error.EIO,
    errno.ENOMEM: Error.ENOMEM,
    errno.ENOSPC: Error.ENOSPC,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
    errno.EOPNOTSUPP: Error.ENOTSUP,
    errno.ESHUTDOWN: Error.ESHUTDOWN,
}


def nbd_error(error: OSError) -> Error:
    """The NBD error of a host error: one of the eight that the specification defines ("Error
    values").
    """
    return _ERROR_OF_ERRNO.get(error.errno or 0, Error.EINVAL)


def _compressed_by(extent: Extent) -> BlockNode | None:
    return extent.node if extent.kind == COMPRESSED else None


class Commands:
    """Serves the requests of one session on one export."""

    def __init__(self, export: Export, session: Session, dialect: Dialect) -> None:
        self._export = export
        self._node = export.node
        self._size = export.node.size
        self._dialect = dialect
        self._contexts = {
            number: export.contexts[name] for number, name in session.contexts.items()
        }
        self._legal_flags = {
            int(command): rule.flags
            | (rule.structured if dialect.structured else 0)
            | (rule.extended if dialect.extended else 0)
            for command, rule in RULES.items()
        }
        self._rules = {int(command): rule for command, rule in RULES.items()}
        self.stopping = False
        """The server goes down: every request gets NBD_ESHUTDOWN."""

    def validate(self, request: Request) -> None:
        """Raise `RequestError` unless the request's header is one that can be served."""
        flags, command, _, offset, length, _ = request
        if self.stopping:
            raise RequestError(Error.ESHUTDOWN, "the server is shutting down")
        rule = self._rules.get(command)
        if rule is None:
            raise RequestError(Error.EINVAL, f"unknown command {command}")
        if rule.writes and self._export.read_only:
            raise RequestError(Error.EPERM, f"{Command(command)} on a read-only export")
        if illegal := flags & ~self._legal_flags[command]:
            raise RequestError(
                Error.EINVAL, f"{Command(command)} does not take the flags {illegal:#x} here"
            )
        if command == Command.FLUSH:
            if offset or length:
                raise RequestError(Error.EINVAL, "NBD_CMD_FLUSH takes no offset and no length")
        elif command == Command.BLOCK_STATUS and flags & _PAYLOAD_LEN:
            # The length is that of the payload: the effect length is inside, and checked with it.
            if not self._contexts or not 0 < length <= longest_filter(self._contexts):
                raise RequestError(
                    Error.EINVAL, f"a filter of {length} bytes for {len(self._contexts)} contexts"
                )
        else:
            self._check_range(command, rule, offset, length)

    def _check_range(self, command: int, rule: CommandRule, offset: int, length: int) -> None:
        if offset + length > self._size:
            error = rule.beyond_end if length else Error.EINVAL
            raise RequestError(
                error,
                f"{Command(command)} of {offset}+{length} leaves the export of {self._size} bytes",
            )
        if rule.limited and length > MAX_PAYLOAD:
            raise RequestError(
                Error.EINVAL, f"{Command(command)} of {length} bytes; at most {MAX_PAYLOAD} at once"
            )
        if command == Command.BLOCK_STATUS and not length:
            raise RequestError(Error.EINVAL, "NBD_CMD_BLOCK_STATUS of no bytes")

    async def serve(self, request: Request) -> Sequence[Piece]:
        """The whole reply to any request but a WRITE, errors included."""
        try:
            self.validate(request)
            return await self._serve[request.command](self, request)
        except (RequestError, OSError, MemoryError) as error:
            return (self.refusal(request, error),)
        except Exception:
            log.exception("a defect in pynbd, while serving %s", request)
            return (self.refusal(request, OSError(errno.EIO, "internal error")),)

    async def write_batch(self, requests: Sequence[Request]) -> Sequence[Piece]:
        """The replies to WRITE requests that were validated, with or without FUA alike."""
        fua = any(request.flags & _FUA for request in requests)
        pieces = [(request.offset, request.payload) for request in requests if request.payload]
        try:
            errors = await self._pwrite(pieces, fua=fua)
        except (OSError, MemoryError) as error:
            return [self.refusal(request, error) for request in requests]
        except Exception:
            log.exception("a defect in pynbd, while writing")
            failure = OSError(errno.EIO, "internal error")
            return [self.refusal(request, failure) for request in requests]
        if not any(errors):
            done = self._dialect.done
            return (b"".join([done(request.cookie, request.offset) for request in requests]),)
        failures = iter(errors)
        replies: list[Piece] = []
        for request in requests:
            failed = next(failures) if request.payload else None
            replies.append(
                self.refusal(request, failed)
                if failed
                else self._dialect.done(request.cookie, request.offset)
            )
        return replies

    async def _pwrite(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool
    ) -> list[OSError | None]:
        detect = self._export.detect_zeroes
        if detect is DetectZeroes.OFF:
            return await self._node.pwrite_batch(pieces, fua=fua)
        return await pwrite_detecting(self._node, pieces, detect, fua=fua)

    def refusal(self, request: Request, error: RequestError | OSError | MemoryError) -> bytes:
        """The reply to a request that failed."""
        if isinstance(error, MemoryError):
            error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if isinstance(error, RequestError):
            code, text = Error(error.error), error.message
        else:
            code, text = nbd_error(error), error.strerror or str(error)
            if code == Error.ENOTSUP and not request.flags & _FAST_ZERO:
                code = Error.EINVAL  # the specification keeps ENOTSUP for FAST_ZERO
            if code != Error.ENOTSUP:
                line = f"{error.filename or self._node.name}: {request}: {text}"
                self._export.troubles.tell(line, (request.command, code), request.offset)
        return self._dialect.error(request.cookie, request.offset, code, text)

    # Reading

    async def _read(self, request: Request) -> Sequence[Piece]:
        dialect, cookie, offset = self._dialect, request.cookie, request.offset
        if not request.length:
            return (dialect.done(cookie, offset),)
        if request.flags & _FUA and not self._export.read_only:
            await self._node.flush()
        reply_end = ReplyEnd(dialect.done(cookie, offset) if dialect.structured else b"", None)
        pins = self._node.pins
        if pins:
            pinned = pins.hold()
            pinned.begin()
            reply_end.release = pinned.end  # once its last byte was read
        try:
            return await self._read_pinned(request, reply_end)
        except BaseException:
            reply_end.over()
            raise

    async def _read_pinned(self, request: Request, reply_end: ReplyEnd) -> Sequence[Piece]:
        dialect, cookie, offset = self._dialect, request.cookie, request.offset
        extents = await self._node.resolve(offset, offset + request.length)
        stretches = await self._stretches(request, extents, reply_end)
        pieces: list[Piece] = []
        for first, last, content in stretches:
            if content:
                pieces += (dialect.data(cookie, offset, first, last - first), *content)
            else:
                pieces.append(dialect.hole(cookie, offset, first, last - first))
        pieces.append(reply_end)
        files = [piece for piece in pieces if isinstance(piece, FilePiece)]
        if files and dialect.structured:
            reply_end.failed = dialect.error(
                cookie, offset, Error.EIO, "the file could not be read"
            )
        if not any(piece.read for piece in files):
            reply_end.over()
        return pieces

    async def _stretches(
        self, request: Request, extents: Sequence[Extent], reply: ReplyEnd
    ) -> Sequence[tuple[int, int, list[Piece]]]:
        """(start, end, content) of each stretch that makes one chunk; a hole has no content."""
        sparse = self._dialect.structured and not request.flags & _DF
        pieces: list[Piece | None] = []
        for batch in range(0, len(extents), EXTENTS_AT_ONCE):
            if batch:
                await asyncio.sleep(0)  # thousands of them would hold the loop
            works: list[Coroutine[Any, Any, Sequence[Piece | None]]] = []
            for node, run in groupby(extents[batch : batch + EXTENTS_AT_ONCE], _compressed_by):
                if node is not None:  # what is decompressed together is one work
                    works.append(self._node.decompressed(list(run)))
                else:
                    works += [self._content(extent, reply, sparse=sparse) for extent in run]
            pieces += chain.from_iterable(await together(works))
        stretches: list[tuple[int, int, list[Piece]]] = []
        for extent, piece in zip(extents, pieces, strict=True):
            first, content = extent.offset, list[Piece]()
            if stretches and bool(stretches[-1][2]) == (piece is not None):
                first, _, content = stretches.pop()
            if piece is not None:
                content.append(piece)
            stretches.append((first, extent.end, content))
        return stretches

    async def _content(
        self, extent: Extent, reply: ReplyEnd, *, sparse: bool
    ) -> Sequence[Piece | None]:
        """What to send for an extent that is not compressed; None for a hole."""
        length = extent.end - extent.offset
        if extent.kind == ZERO:
            return (None if sparse else bytes(length),)
        file = extent.file
        if file is not None and length >= SEND_FILE_MIN:
            if file.resident(extent.host, length):
                read = None if file.lends_pages else file.read_resident
                return (FilePiece(file.fd, extent.host, length, reply, read),)
            data: bytes | None = await extent.node.read_plain(
                file, extent.host, length, sparse=sparse
            )
            return (data,)
        content = bytearray(length)
        await self._node.fetch(extent, extent.offset, memoryview(content))
        return (content,)

    # Everything else

    async def _flush(self, request: Request) -> Sequence[Piece]:
        await self._node.flush()
        return self._done(request)

    async def _trim(self, request: Request) -> Sequence[Piece]:
        if request.length and self._export.unmap:
            fua = bool(request.flags & _FUA)
            await self._node.discard(request.offset, request.length, fua=fua)
        return self._done(request)

    async def _cache(self, request: Request) -> Sequence[Piece]:
        if request.length:
            await self._node.prefetch(request.offset, request.length)
        return self._done(request)

    async def _write_zeroes(self, request: Request) -> Sequence[Piece]:
        if request.length:
            await self._node.write_zeroes(
                request.offset,
                request.length,
                may_unmap=self._export.unmap and not request.flags & _NO_HOLE,
                fast=bool(request.flags & _FAST_ZERO),
                fua=bool(request.flags & _FUA),
                no_hole=self._export.reserve and bool(request.flags & _NO_HOLE),
            )
        return self._done(request)

    async def _block_status(self, request: Request) -> Sequence[Piece]:
        if not self._contexts:
            raise RequestError(Error.EINVAL, "no metadata context was negotiated")
        contexts, length = self._contexts, request.length
        if request.payload is not None:
            length, chosen = decode_filter(request.payload, contexts)
            contexts = {number: contexts[number] for number in chosen}
            rule = self._rules[request.command]
            self._check_range(request.command, rule, request.offset, length)
        answers = await block_status(
            self._node, contexts, request.offset, length, one=bool(request.flags & _REQ_ONE)
        )
        last = max(answers)
        return [
            self._dialect.status(
                request.cookie, request.offset, number, *answers[number], last=number == last
            )
            for number in sorted(answers)
        ]

    def _done(self, request: Request) -> Sequence[Piece]:
        return (self._dialect.done(request.cookie, request.offset),)

    _serve: ClassVar = {
        int(Command.READ): _read,
        int(Command.FLUSH): _flush,
        int(Command.TRIM): _trim,
        int(Command.CACHE): _cache,
        int(Command.WRITE_ZEROES): _write_zeroes,
        int(Command.BLOCK_STATUS): _block_status,
    }
