"""``pynbd-qemu-nbd --list``: what a server exports, printed as ``qemu-nbd --list`` prints it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from pynbd.cli.objects import Objects
from pynbd.cli.output import printable, standard_output
from pynbd.cli.qemu_nbd.options import QemuNbdOptions
from pynbd.cli.qemu_tls import client_uri
from pynbd.client.connecting import list_exports
from pynbd.errors import PynbdError
from pynbd.protocol.handshake_client import RemoteExport
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.protocol.values import TransmissionFlag

_FLAGS = {
    TransmissionFlag.READ_ONLY: "readonly",
    TransmissionFlag.SEND_FLUSH: "flush",
    TransmissionFlag.SEND_FUA: "fua",
    TransmissionFlag.ROTATIONAL: "rotational",
    TransmissionFlag.SEND_TRIM: "trim",
    TransmissionFlag.SEND_WRITE_ZEROES: "zeroes",
    TransmissionFlag.SEND_DF: "df",
    TransmissionFlag.CAN_MULTI_CONN: "multi",
    TransmissionFlag.SEND_RESIZE: "resize",
    TransmissionFlag.SEND_CACHE: "cache",
    TransmissionFlag.SEND_FAST_ZERO: "fast-zero",
    TransmissionFlag.BLOCK_STATUS_PAYLOAD: "block-status-payload",
}


def print_exports(wanted: QemuNbdOptions, objects: Objects) -> None:
    """Raises `PynbdError` where there is no server, or one that does not list."""
    if wanted.socket is not None:
        where = NbdUri(transport=Transport.UNIX, socket=wanted.socket)
    else:
        where = NbdUri(host=wanted.host, port=wanted.tcp_port)
    if wanted.tls_creds is not None:
        where = client_uri(where, objects, wanted.tls_creds, wanted.tls_hostname)
    try:
        exports = asyncio.run(list_exports(where))
    except OSError as error:
        raise PynbdError(f"{where}: {error.strerror or error}") from None
    with standard_output() as write:
        write(f"exports available: {len(exports)}\n")
        for export in exports:
            write("".join(f" {line}\n" for line in _lines(export)))


def _lines(export: RemoteExport) -> Iterator[str]:
    yield f"export: '{printable(export.name)}'"
    if export.description:
        yield f" description: {printable(export.description)}"
    if TransmissionFlag.HAS_FLAGS in export.flags:
        names = "".join(f" {name}" for flag, name in _FLAGS.items() if flag in export.flags)
        yield f" size:  {export.size}"
        yield f" flags: 0x{export.flags:x} ({names} )"
    if export.constrained:
        for what, size in zip(("min", "opt", "max"), export.block_size, strict=True):
            yield f" {what} block: {size}"
    yield f" transaction size: {64 if export.extended else 32}-bit"
    if export.contexts and (export.structured or export.extended):
        yield f" available meta contexts: {len(export.contexts)}"
        yield from (f"  {printable(name)}" for name in export.contexts)
