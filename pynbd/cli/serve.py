"""``pynbd serve``: an image on a socket, until a signal ends it.

It listens before it prints its URI, the first line of standard output; standard error stays empty
unless something is wrong. Started by socket activation (LISTEN_FDS) it serves there, prints
nothing, and ends when the last client has left.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from pynbd.block.chain import FORMATS
from pynbd.block.image_options import JSON_PREFIX
from pynbd.block.limits import ImageLimits
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.format import MAX_BITMAP_NAME
from pynbd.cli import python_export
from pynbd.cli.activation import activated_sockets
from pynbd.cli.client_limits import limit_options, limits_of
from pynbd.cli.completion import file_names
from pynbd.cli.image_limits import image_limit_options, image_limits_of
from pynbd.cli.logs import configure, log_options
from pynbd.cli.looking import untrusted_option
from pynbd.cli.loops import FASTEST, LOOPS
from pynbd.cli.numbers import whole_number
from pynbd.cli.running import (
    check_addresses,
    listen_on,
    print_first_line,
    run_server,
)
from pynbd.cli.signals import watch
from pynbd.cli.texts import export_text
from pynbd.cli.tls_options import Security, TlsOptions, tls_options, tls_options_of
from pynbd.errors import UsageError
from pynbd.protocol.values import DEFAULT_PORT
from pynbd.server.export import Export
from pynbd.server.limits import Limits
from pynbd.server.listening import Listening
from pynbd.server.offers import offered_contexts
from pynbd.server.serving import open_to_serve
from pynbd.server.zeroes import DetectZeroes, Discard


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `serve` was asked for; the names are those of its options."""

    image: str | None
    python: str | None
    socket: str | None
    bind: str | None
    port: int | None
    format: str | None
    read_only: bool
    snapshot: bool
    export_name: str
    description: str
    load_snapshot: str | None
    allocation_depth: bool
    bitmap: tuple[str, ...]
    discard: str
    detect_zeroes: str
    shared: int
    force_share: bool
    probe_backing: bool
    untrusted: bool
    limits: Limits
    image_limits: ImageLimits
    tls: TlsOptions
    loop: str
    trace: bool

    @property
    def host(self) -> str:
        """Where it listens, unless on a unix socket."""
        return self.bind or "localhost"


@click.command(
    short_help="Serve an image over NBD.",
    epilog="""\b
Environment:
  LISTEN_PID, LISTEN_FDS  socket activation: the listening sockets, from 3 on
  SSLKEYLOGFILE           a file for the secrets of TLS, with which Wireshark reads what is sent

\b
Examples:
  pynbd serve disk.qcow2
  pynbd serve -k /run/disk.sock -x disk disk.qcow2
  pynbd serve -r -B backup-1 disk.qcow2
  pynbd serve --untrusted -f qcow2 -r -k /run/disk.sock upload.qcow2
  pynbd serve --python heat.py:Heat
  pynbd serve --tls=auto disk.qcow2
  pynbd serve -b 0.0.0.0 --tls-certificates pki disk.qcow2
  pynbd serve --tls-certificates pki --tls-verify-peer --allow write,cert=alice disk.qcow2
  pynbd serve -k /run/disk.sock --allow read --allow write,uid=root disk.qcow2
  nbdinfo -- [ pynbd serve disk.qcow2 ]
""",
)
@click.argument("image", required=False, shell_complete=file_names)
@click.option(
    "--python",
    metavar="FILE.py:NAME",
    help="Serve, in place of IMAGE, a pynbd.Disk: a class, an object or a function of that name.",
)
@click.option(
    "-k",
    "--socket",
    metavar="PATH",
    shell_complete=file_names,
    help="Listen on a unix socket.",
)
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
@click.option("-r", "--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "-s",
    "--snapshot",
    is_flag=True,
    help="Write to a temporary file, which is gone in the end; IMAGE is only read.",
)
@click.option(
    "-x",
    "--export-name",
    metavar="NAME",
    callback=export_text,
    help="The name of the export (default: empty).",
)
@click.option(
    "-D",
    "--description",
    metavar="TEXT",
    callback=export_text,
    help="What clients are told of it (default: nothing).",
)
@click.option(
    "-l",
    "--load-snapshot",
    metavar="SNAP",
    help="Serve an internal snapshot, read-only but for -s: NAME, ID, snapshot.name=NAME or"
    " snapshot.id=ID.",
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
    "--discard",
    type=click.Choice([choice.value for choice in Discard]),
    default=Discard.UNMAP.value,
    show_default=True,
    help="Whether what clients discard is given back to the file system.",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice([choice.value for choice in DetectZeroes]),
    default=DetectZeroes.OFF.value,
    show_default=True,
    help="What becomes of writes of nothing but zeroes: on marks them as zeroes, unmap makes holes"
    " of them, and needs --discard=unmap.",
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
    "--force-share",
    is_flag=True,
    help="Read an image that another process may be writing; no writes but for -s.",
)
@click.option(
    "--probe-backing",
    is_flag=True,
    help="Guess the format of backing files that have none recorded.",
)
@untrusted_option
@tls_options
@limit_options
@image_limit_options
@log_options
@click.option(
    "--loop",
    type=click.Choice(list(LOOPS)),
    default=FASTEST,
    show_default=True,
    help="The event loop.",
)
def serve(
    verbose: bool, trace: bool, log_format: str, **options: Any
) -> None:  # the options are ServeOptions, name by name
    """Serve IMAGE over NBD until a signal ends it (TERM, INT, QUIT, HUP).

    Any number of clients, on localhost by default. The first line of output is the URI.
    """
    configure(verbose=verbose, trace=trace, log_format=log_format)
    tls = tls_options_of(options)
    wanted = ServeOptions(
        trace=trace,
        limits=limits_of(options),
        image_limits=image_limits_of(options),
        tls=tls,
        **options,
    )
    _check(wanted)
    sockets = activated_sockets()
    check_addresses(sockets, wanted.socket, wanted.bind, wanted.port)
    tls.check(activated=bool(sockets))
    watch()
    with tls.opened(
        wanted.export_name, path=wanted.socket, host=wanted.host, activated=bool(sockets)
    ) as security:
        LOOPS[wanted.loop](_serve(wanted, sockets, security))


def _check(wanted: ServeOptions) -> None:
    if wanted.detect_zeroes == DetectZeroes.UNMAP and wanted.discard != Discard.UNMAP:
        raise UsageError("--detect-zeroes=unmap needs --discard=unmap")
    if wanted.python is not None:
        for option, given in (
            ("IMAGE", wanted.image is not None),
            ("--format", wanted.format is not None),
            ("--snapshot", wanted.snapshot),
            ("--load-snapshot", wanted.load_snapshot is not None),
            ("--allocation-depth", wanted.allocation_depth),
            ("--bitmap", bool(wanted.bitmap)),
            ("--force-share", wanted.force_share),
            ("--probe-backing", wanted.probe_backing),
            ("--untrusted", wanted.untrusted),
        ):
            if given:
                raise UsageError(f"{option}: it does not go with --python")
        return
    if wanted.image is None:
        raise UsageError("missing argument 'IMAGE'")
    if not wanted.image:
        raise UsageError("IMAGE: the name of a file is expected")
    # "nbd://host", "ssh:x": as QEMU tells them from files, by a colon before any slash.
    is_protocol = ":" in wanted.image.partition("/")[0] and not os.path.lexists(wanted.image)
    if is_protocol and not wanted.image.startswith(JSON_PREFIX):
        raise UsageError(f"IMAGE: {wanted.image!r} is a protocol name, not a file")
    for name in wanted.bitmap:
        length = len(os.fsencode(name))
        if length > MAX_BITMAP_NAME:
            raise UsageError(
                f"--bitmap: the name has {length} bytes; at most {MAX_BITMAP_NAME} are allowed"
            )
    if wanted.bitmap and wanted.load_snapshot is not None:
        raise UsageError("--bitmap: bitmaps describe the active state, not a snapshot (-l)")


async def _open(wanted: ServeOptions) -> BlockNode:
    if wanted.python is not None:
        return await python_export.open_python_export(wanted.python, read_only=wanted.read_only)
    assert wanted.image is not None
    return await open_to_serve(
        wanted.image,
        read_only=wanted.read_only,
        overlay=wanted.snapshot,
        format=wanted.format,
        snapshot=wanted.load_snapshot,
        probe_backing=wanted.probe_backing,
        force_share=wanted.force_share,
        untrusted=wanted.untrusted,
        limits=wanted.image_limits,
    )


async def _serve(
    wanted: ServeOptions, sockets: Sequence[socket.socket], security: Security
) -> None:
    async with await _open(wanted) as node:
        unasked = not (wanted.allocation_depth or wanted.bitmap)
        contexts = offered_contexts(
            node,
            depth=None if unasked else wanted.allocation_depth,
            bitmaps=None if unasked else wanted.bitmap,
        )
        export = Export(
            wanted.export_name,
            node,
            description=wanted.description,
            contexts=contexts,
            multi_conn=wanted.shared != 1,
            unmap=wanted.discard == Discard.UNMAP,
            detect_zeroes=DetectZeroes(wanted.detect_zeroes),
            access=security.access,
        )

        def listen() -> Listening:
            port = DEFAULT_PORT if wanted.port is None else wanted.port
            return listen_on(sockets, wanted.socket, wanted.host, port)

        def ready(listening: Listening) -> None:
            if not sockets:
                where = replace(listening.where, export=wanted.export_name)
                print_first_line("\n".join(security.lines(where)))

        await run_server(
            export,
            listen,
            ready,
            max_clients=wanted.shared,
            until_idle=bool(sockets),
            limits=wanted.limits,
            tls=security.tls,
            thrown_away=wanted.snapshot,
            trace=wanted.trace,
        )
