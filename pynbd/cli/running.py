"""Running a server in the foreground: the event loop, signals, the socket file, socket activation.

`pynbd serve` and the drop-in for qemu-nbd share it; they differ in what they open, where they
listen, and when they end.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING

from pynbd.block.node import BlockNode
from pynbd.cli.descriptors import allow_many_descriptors
from pynbd.cli.logs import line_of
from pynbd.cli.memory import keep_freed_blocks
from pynbd.cli.output import drop_standard_output
from pynbd.cli.signals import watch
from pynbd.errors import PynbdError, UsageError
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.listening import Listening, check_socket_path
from pynbd.server.server import Server

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls


async def run_server(
    export: Export,
    listen: Callable[[], Listening],
    ready: Callable[[Listening], object],
    *,
    max_clients: int,
    until_idle: bool,
    limits: Limits,
    tls: Tls | None = None,
    thrown_away: bool = False,
    trace: bool = False,
) -> None:
    """Serve ``export`` until a signal ends it, or with ``until_idle`` the last client has left.

    ``ready`` is called once clients can connect. ``thrown_away``: nobody misses what was written.
    """
    keep_freed_blocks()
    allow_many_descriptors()
    with closing(listen()) as listening:
        watch().clean = partial(_clean, listening, watch().clean)
        if not thrown_away:
            watch().last_line = partial(_what_is_lost, export.node)
        server = Server(
            ExportTable([export]),
            listening.sockets,
            max_clients=max_clients,
            until_idle=until_idle,
            limits=limits,
            tls=tls,
            trace=trace,
        )
        watch().stop = partial(_stop, server, asyncio.get_running_loop())
        ready(listening)
        await server.run()


def listen_on(
    sockets: Sequence[socket.socket], path: str | None, host: str, port: int
) -> Listening:
    """On ``sockets`` that somebody has activated, on a unix socket, or on TCP."""
    if sockets:
        return Listening.given(sockets)
    if path is not None:
        return Listening.unix(path)
    try:
        return Listening.tcp(host, port)
    except UsageError as error:
        raise UsageError(f"--bind: {error}") from None


def _clean(listening: Listening, before: Callable[[], object]) -> None:
    listening.remove()
    before()


def _stop(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):  # the loop is closed: the server has ended by itself
        loop.call_soon_threadsafe(server.stop)


def _what_is_lost(top: BlockNode) -> str:
    """The line that tells what an end at once loses; "" if nothing."""
    for node in top.chain():
        if node.unfinished:
            lost = "what was not flushed may be lost"
            if any(bitmap.enabled for bitmap in node.bitmaps()):
                lost = f"its bitmaps are not saved, and {lost}"
            return line_of(f"{node.name}: ended by a second signal before it was finished: {lost}")
    return ""


def print_first_line(line: object) -> None:
    """Print to standard output at once. Raises `PynbdError` if there is nobody to read it."""
    try:
        print(line, flush=True)
    except OSError as error:
        drop_standard_output()
        raise PynbdError(f"standard output: {error.strerror}") from None


def check_addresses(
    sockets: Sequence[socket.socket], path: str | None, bind: str | None, port: int | None
) -> None:
    """Raise `UsageError` where --socket, --bind, --port and socket activation exclude each other,
    or have no sense.
    """
    if sockets and (path, bind, port) != (None, None, None):
        raise UsageError(
            "--socket, --bind and --port cannot be used with socket activation (LISTEN_FDS)"
        )
    if bind == "":
        raise UsageError("--bind: an address or the name of a host is expected")
    if path is not None:
        if bind is not None or port is not None:
            raise UsageError("--socket excludes --bind and --port")
        check_socket_path("--socket", path)
