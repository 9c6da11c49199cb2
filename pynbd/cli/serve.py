"""``pynbd serve``: an image on a socket, until a signal ends it.

It listens before it prints its URI, the first line of standard output; standard error stays empty
unless something is wrong. Started by socket activation (LISTEN_FDS) it serves there, prints
nothing, and ends when the last client has left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import click

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.chain import FORMATS, open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.format import MAX_BITMAP_NAME
from pynbd.cli.activation import activated_sockets
from pynbd.cli.numbers import seconds, whole_number
from pynbd.cli.signals import watch
from pynbd.errors import ImageError, PynbdError, UnsupportedFeature, UsageError
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.protocol.values import DEFAULT_PORT, MAX_STRING
from pynbd.server.connection import HANDSHAKE_LIMIT
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.server import Server, SocketFile, listen_tcp, listen_unix

_Run = Callable[[Coroutine[Any, Any, None]], None]
_LOOPS: dict[str, _Run] = {}
try:
    import uvloop
except ImportError:
    pass  # asyncio's own loop does, more slowly
else:
    _LOOPS["uvloop"] = uvloop.run
_LOOPS["asyncio"] = asyncio.run

log = logging.getLogger("pynbd")

# A client that asks for everything asks for all of these in each reply.
_MAX_UNASKED_BITMAPS = 64
# Bytes of the path of a unix socket: sun_path with its final NUL has 108 (unix(7)).
_MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `serve` was asked for; the names are those of its options."""

    image: str
    socket: str | None
    bind: str | None
    port: int | None
    format: str | None
    read_only: bool
    export_name: str
    description: str
    load_snapshot: str | None
    allocation_depth: bool
    bitmap: tuple[str, ...]
    shared: int
    force_share: bool
    probe_backing: bool
    handshake_limit: float
    loop: str


@click.command(
    epilog="""\b
Examples:
  pynbd serve disk.qcow2
  pynbd serve -k /run/disk.sock -x disk disk.qcow2
  pynbd serve -r -B backup-1 disk.qcow2
  nbdinfo -- [ pynbd serve disk.qcow2 ]
"""
)
@click.argument("image")
@click.option("-k", "--socket", metavar="PATH", help="Listen on a unix socket.")
@click.option("-b", "--bind", metavar="ADDR", help="Listen on this address (default: localhost).")
@click.option(
    "-p",
    "--port",
    metavar="PORT",
    type=whole_number(0, 65535),
    help=f"Listen on this port, 0 for any free one (default: {DEFAULT_PORT}).",
)
@click.option(
    "-f",
    "--format",
    type=click.Choice(FORMATS),
    help="The format of IMAGE (default: told by its first bytes; a raw image is then kept from"
    " being made to look like another format).",
)
@click.option(
    "-r", "--read-only", is_flag=True, help="Refuse writes. A qcow2 image is read-only for now."
)
@click.option(
    "-x",
    "--export-name",
    metavar="NAME",
    default="",
    help="The name of the export (default: empty).",
)
@click.option(
    "-D", "--description", metavar="TEXT", default="", help="What clients are told of it."
)
@click.option(
    "-l",
    "--load-snapshot",
    metavar="SNAP",
    help="Serve an internal snapshot: NAME, ID, snapshot.name=NAME or snapshot.id=ID.",
)
@click.option(
    "-A",
    "--allocation-depth",
    is_flag=True,
    help="Offer qemu:allocation-depth. Without -A and -B it is offered together with every bitmap.",
)
@click.option(
    "-B",
    "--bitmap",
    metavar="NAME",
    multiple=True,
    help="Offer qemu:dirty-bitmap:NAME; repeatable.",
)
@click.option(
    "-e",
    "--shared",
    metavar="NUM",
    type=whole_number(0),
    default=0,
    help="Clients at a time; more wait. 0 is any number, the default.",
)
@click.option(
    "--force-share", is_flag=True, help="Read an image that another process may be writing."
)
@click.option(
    "--probe-backing",
    is_flag=True,
    help="Guess the format of backing files that have none recorded.",
)
@click.option(
    "--handshake-limit",
    metavar="SECONDS",
    type=seconds,
    default=HANDSHAKE_LIMIT,
    show_default=True,
    help="Time for the negotiation; 0 is no limit.",
)
@click.option("-v", "--verbose", is_flag=True, help="Tell of clients that come and go.")
@click.option(
    "--loop",
    type=click.Choice(list(_LOOPS)),
    default=next(iter(_LOOPS)),
    show_default=True,
    help="The event loop.",
)
def serve(verbose: bool, **options: Any) -> None:  # the options are ServeOptions, name by name
    """Serve IMAGE over NBD until a signal ends it (TERM, INT, QUIT, HUP).

    Any number of clients, on localhost by default. The first line of output is the URI.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="pynbd: %(message)s"
    )
    wanted = ServeOptions(**options)
    _check(wanted)
    sockets = activated_sockets()
    if sockets and (wanted.socket, wanted.bind, wanted.port) != (None, None, None):
        raise UsageError(
            "--socket, --bind and --port cannot be used with socket activation (LISTEN_FDS)"
        )
    watch()
    _LOOPS[wanted.loop](_serve(wanted, sockets))


def _check(wanted: ServeOptions) -> None:
    for option, text in (
        ("--export-name", wanted.export_name),
        ("--description", wanted.description),
    ):
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise UsageError(f"{option}: it has to be UTF-8") from None
        if length > MAX_STRING:
            raise UsageError(f"{option}: it has {length} bytes; at most {MAX_STRING} are allowed")
    if not wanted.image:
        raise UsageError("IMAGE: the name of a file is expected")
    # "nbd://host", "json:{}": as QEMU tells them from files, by a colon before any slash.
    if ":" in wanted.image.partition("/")[0] and not os.path.lexists(wanted.image):
        raise UsageError(f"IMAGE: {wanted.image!r} is a protocol name, not a file")
    if wanted.bind == "":
        raise UsageError("--bind: an address or the name of a host is expected")
    for name in wanted.bitmap:
        length = len(os.fsencode(name))
        if length > MAX_BITMAP_NAME:
            raise UsageError(
                f"--bitmap: the name has {length} bytes; at most {MAX_BITMAP_NAME} are allowed"
            )
    if wanted.socket is not None:
        if wanted.bind is not None or wanted.port is not None:
            raise UsageError("--socket excludes --bind and --port")
        length = len(os.fsencode(wanted.socket))
        if not 0 < length <= _MAX_SOCKET_PATH:
            raise UsageError(
                f"--socket: the path has {length} bytes; 1 to {_MAX_SOCKET_PATH} are allowed"
            )


async def _serve(wanted: ServeOptions, sockets: Sequence[socket.socket]) -> None:
    activated = bool(sockets)
    node = await _open(wanted)
    try:
        export = Export(
            wanted.export_name,
            node,
            description=wanted.description,
            contexts=standard_contexts(
                depth=wanted.allocation_depth or not wanted.bitmap,
                bitmaps=_bitmaps(node, wanted),
            ),
            multi_conn=wanted.shared != 1,
        )
        with ExitStack() as cleanup:
            if not activated:
                sockets = _listen(wanted)
            if wanted.socket is not None:
                socket_file = SocketFile(wanted.socket)
                watch().clean = cleanup.callback(socket_file.remove)
            server = Server(
                ExportTable([export]),
                sockets,
                max_clients=wanted.shared,
                until_idle=activated,
                handshake_limit=wanted.handshake_limit,
            )
            watch().stop = partial(_stop, server, asyncio.get_running_loop())
            if not activated:
                _print(_uri(sockets[0], wanted))
            await server.run()
    finally:
        await node.close()


def _print(uri: NbdUri) -> None:
    try:
        print(uri, flush=True)
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # where the interpreter flushes it in the end
            os.dup2(nowhere.fileno(), 1)
        raise PynbdError(f"standard output: {error.strerror}") from None


def _stop(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):  # the loop is closed: the server has ended by itself
        loop.call_soon_threadsafe(server.stop)


async def _open(wanted: ServeOptions) -> BlockNode:
    async def attempt(*, read_only: bool) -> BlockNode:
        return await open_image(
            wanted.image,
            format=wanted.format,
            read_only=read_only,
            snapshot=wanted.load_snapshot,
            probe_backing=wanted.probe_backing,
            force_share=wanted.force_share,
        )

    read_only = wanted.read_only or wanted.force_share or wanted.load_snapshot is not None
    if not read_only:
        try:
            return await attempt(read_only=False)
        except UnsupportedFeature:
            pass  # a qcow2 image: it cannot be written yet; what else it may lack shows below
    return await attempt(read_only=True)


def _bitmaps(node: BlockNode, wanted: ServeOptions) -> Sequence[DirtyBitmap]:
    """The bitmaps on offer: those that were named, or the consistent ones of the active layer."""
    if wanted.bitmap:
        if wanted.load_snapshot is not None:
            raise UsageError("--bitmap: bitmaps describe the active state, not a snapshot (-l)")
        return [_find_bitmap(node, name) for name in dict.fromkeys(wanted.bitmap)]
    if wanted.allocation_depth:
        return ()
    if torn := node.inconsistent_bitmaps():
        log.warning("%s: inconsistent bitmaps are not offered: %s", node.name, _listed(torn))
    there = node.bitmaps()
    if len(there) > _MAX_UNASKED_BITMAPS:
        log.warning(
            "%s: %d of its %d bitmaps are offered; --bitmap offers others",
            node.name,
            _MAX_UNASKED_BITMAPS,
            len(there),
        )
    return there[:_MAX_UNASKED_BITMAPS]


def _find_bitmap(top: BlockNode, name: str) -> DirtyBitmap:
    for depth, node in enumerate(top.chain()):
        for bitmap in node.bitmaps():
            if bitmap.name == name:
                if depth:
                    log.warning(
                        "bitmap %r is of the backing file %s: it knows nothing of writes above it",
                        name,
                        node.name,
                    )
                return bitmap
        if name in node.inconsistent_bitmaps():
            raise ImageError(
                f"{node.name}: bitmap {name!r} is inconsistent (it was in use when its last writer"
                " ended) and cannot be served"
            )
    raise ImageError(f"{top.name}: no bitmap {name!r}; {_known_bitmaps(top)}")


def _known_bitmaps(top: BlockNode) -> str:
    known: dict[str, str] = {}
    for depth, node in enumerate(top.chain()):
        where = f" (in {os.path.basename(node.name)})" if depth else ""
        for bitmap in node.bitmaps():
            known.setdefault(bitmap.name, where)
    if not known:
        return "there is none"
    verb = "is" if len(known) == 1 else "are"
    return f"there {verb} {_listed(known, known.values())}"


def _listed(names: Collection[str], where: Iterable[str] = repeat("")) -> str:
    """Names in quotes, each with ``where`` it is; the first ones, if there are very many."""
    shown = [f"{name!r}{place}" for name, place in zip(names, where, strict=False)]
    more = len(shown) - _MAX_UNASKED_BITMAPS
    rest = [f"{more} more"] if more > 0 else []
    return ", ".join(shown[:_MAX_UNASKED_BITMAPS] + rest)


def _listen(wanted: ServeOptions) -> list[socket.socket]:
    port = DEFAULT_PORT if wanted.port is None else wanted.port
    host = wanted.bind or "localhost"
    try:
        if wanted.socket is not None:
            return [listen_unix(wanted.socket)]
        return listen_tcp(host, port)
    except UnicodeError:
        raise UsageError(f"--bind: {host!r} is neither an address nor the name of a host") from None
    except OSError as error:
        where = wanted.socket or f"{host}, port {port or 'any'}"
        raise PynbdError(f"cannot listen on {where}: {error.strerror}") from None


def _uri(listener: socket.socket, wanted: ServeOptions) -> NbdUri:
    if wanted.socket is not None:
        path = os.path.abspath(wanted.socket)
        return NbdUri(transport=Transport.UNIX, socket=path, export=wanted.export_name)
    port = listener.getsockname()[1]
    return NbdUri(host=wanted.bind or "localhost", port=port, export=wanted.export_name)
