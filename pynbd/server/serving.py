"""`serve`: an image under a URI for as long as a ``with`` block lasts; the server as a library."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pynbd.block import overlay as overlays
from pynbd.block.chain import open_image
from pynbd.block.limits import ImageLimits, limits_or_usual
from pynbd.block.node import BlockNode
from pynbd.errors import UsageError
from pynbd.protocol.handshake import TlsMode
from pynbd.protocol.values import DEFAULT_PORT
from pynbd.server.access import Allow
from pynbd.server.disk import Disk, DiskNode
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.listening import Listening
from pynbd.server.offers import offered_contexts
from pynbd.server.reach import Reach, check_rules
from pynbd.server.server import Server
from pynbd.server.zeroes import DetectZeroes, Discard

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls

C = TypeVar("C", Discard, DetectZeroes)


class Serving:
    """A server that runs. ``uri``: where clients find the export."""

    def __init__(self, uri: str, export: Export, server: Server, running: asyncio.Task[None]):
        self.uri = uri
        self.export = export
        self._server = server
        self._running = running

    def stop(self) -> None:
        """End in good order, before the ``with`` block does."""
        self._server.stop()

    async def ended(self) -> None:
        """Until the server has ended. Raises what ended it, if something did."""
        await asyncio.shield(self._running)


@asynccontextmanager
async def serve(
    image: str | os.PathLike[str] | BlockNode | Disk,
    *,
    export_name: str = "",
    description: str = "",
    format: str | None = None,  # noqa: A002 (the word of the command lines)
    read_only: bool = False,
    overlay: bool = False,
    snapshot: str | None = None,
    probe_backing: bool = False,
    force_share: bool = False,
    untrusted: bool = False,
    image_limits: ImageLimits | None = None,
    depth: bool | None = None,
    bitmaps: Sequence[str] | None = None,
    discard: str = Discard.UNMAP,
    detect_zeroes: str = DetectZeroes.OFF,
    socket: str | os.PathLike[str] | None = None,
    host: str | None = None,
    port: int | None = None,
    max_clients: int = 0,
    limits: Limits | None = None,
    tls: Tls | None = None,
    access: Sequence[Allow] | None = None,
    structured: bool = True,
    extended: bool = True,
) -> AsyncIterator[Serving]:
    """Serve an image; it listens when the block is entered, and has gone when it is left::

        async with pynbd.serve("disk.qcow2", read_only=True) as server:
            print(server.uri)
            await server.ended()

    ``image``: a file, or what is open already, and stays so, or a `Disk`, which is closed in the
    end. ``format``, ``snapshot``, ``probe_backing``, ``force_share`` and ``untrusted`` as
    `open_image` takes them; they are for files, and so is ``image_limits``, its ``limits``. An
    image is opened for writing, unless ``read_only`` is asked for or nothing else is possible: with
    ``snapshot`` and ``force_share``. ``overlay``: what clients write is seen by them, but goes to a
    temporary file, which is gone in the end.

    It listens on a unix socket in a private folder; or on the unix ``socket``; or, with ``host`` or
    ``port``, on TCP: localhost unless ``host`` says otherwise, any free port if ``port`` is 0.
    ``max_clients``: more than these wait; 0 is any number. ``limits``: what clients may take of the
    server, `Limits()` if None. ``tls``: how it does TLS; None is in clear. ``access``: who may
    read, and who may write; None is everybody, and [] is nobody. Without ``structured`` or
    ``extended`` it refuses structured replies or extended headers, as an older server does.

    ``discard``: "unmap", or "ignore" what clients discard. ``detect_zeroes``: writes of nothing but
    zeroes are data ("off"), zeroes that keep their space ("on"), or holes ("unmap", which needs
    ``discard="unmap"``).

    ``base:allocation`` is always offered; with ``depth`` also qemu:allocation-depth, and the named
    ``bitmaps``; where both are None, depth and every consistent bitmap of the active layer.

    Raises `ImageError`, `PynbdError` where it cannot listen, `UsageError` for arguments that make
    no sense; and at the end of the block `OSError` if an image that was written could not
    be finished.
    """
    if socket is not None and (host is not None or port is not None):
        raise UsageError("socket excludes host and port")
    if max_clients < 0:
        raise UsageError(f"max_clients: 0 or more is expected, not {max_clients}")
    if tls is not None and not isinstance(getattr(tls, "mode", None), TlsMode):
        raise UsageError(f"tls: a pynbd.Tls is expected, not {tls!r:.80}")
    if access is not None:
        on_unix = host is None and port is None
        check_rules(access, Reach.of(tls, unix=on_unix, tcp=not on_unix))
    limits = limits_or_usual(Limits, limits, "limits")
    limits_or_usual(ImageLimits, image_limits, "image_limits")
    unmap = _choice("discard", Discard, discard) is Discard.UNMAP
    detect = _choice("detect_zeroes", DetectZeroes, detect_zeroes)
    if detect is DetectZeroes.UNMAP and not unmap:
        raise UsageError("detect_zeroes='unmap' needs discard='unmap'")
    if isinstance(image, BlockNode | Disk):
        of_files = {
            "format": format,
            "overlay": overlay,
            "snapshot": snapshot,
            "probe_backing": probe_backing,
            "force_share": force_share,
            "untrusted": untrusted,
            "image_limits": image_limits,
        }
        given = [name for name, value in of_files.items() if value]
        if isinstance(image, BlockNode) and read_only and not image.read_only:
            given.append("read_only")
        if given:
            raise UsageError(f"{given[0]}: it is for image files, not for what is open already")
    async with AsyncExitStack() as stack:
        if isinstance(image, BlockNode):
            node = image
        elif isinstance(image, Disk):
            node = DiskNode(image, read_only=read_only)
            stack.push_async_callback(node.close)
        else:
            node = await open_to_serve(
                image,
                read_only=read_only,
                overlay=overlay,
                format=format,
                snapshot=snapshot,
                probe_backing=probe_backing,
                force_share=force_share,
                untrusted=untrusted,
                limits=image_limits,
            )
            stack.push_async_callback(node.close)
        contexts = offered_contexts(node, depth=depth, bitmaps=bitmaps)
        export = Export(
            export_name,
            node,
            description=description,
            contexts=contexts,
            multi_conn=max_clients != 1,
            unmap=unmap,
            detect_zeroes=detect,
            access=access,
        )
        listening = _listen(socket, host, port)
        stack.callback(listening.close)
        server = Server(
            ExportTable([export]),
            listening.sockets,
            max_clients=max_clients,
            limits=limits,
            tls=tls,
            structured=structured,
            extended=extended,
        )
        running = asyncio.create_task(server.run())
        try:
            uri = str(replace(listening.where, export=export_name, tls=tls is not None))
            yield Serving(uri, export, server, running)
        finally:
            server.stop()
            await running


def _choice(name: str, choices: type[C], given: str) -> C:
    try:
        return choices(given)
    except ValueError:
        known = ", ".join(repr(str(choice)) for choice in choices)
        raise UsageError(f"{name}: one of {known} is expected, not {given!r}") from None


def _listen(socket: str | os.PathLike[str] | None, host: str | None, port: int | None) -> Listening:
    if socket is not None:
        return Listening.unix(socket)
    if host is None and port is None:
        return Listening.private()
    return Listening.tcp(host or "localhost", DEFAULT_PORT if port is None else port)


async def open_to_serve(
    image: str | os.PathLike[str] | Mapping[str, object],
    *,
    read_only: bool,
    overlay: bool = False,
    snapshot: str | None = None,
    force_share: bool = False,
    **options: Any,
) -> BlockNode:
    """Open an image, with ``options`` of `open_image`: for writing, unless it is to be
    ``read_only`` or nothing else is possible. ``overlay``: as in `serve`.
    """
    options |= {"snapshot": snapshot, "force_share": force_share}
    if overlay and not read_only:
        return await overlays.open_with_overlay(image, **options)
    read_only = read_only or force_share or snapshot is not None
    return await open_image(image, read_only=read_only, **options)
