"""What a server tells of itself and of its exports: the keys and values of
``nbdinfo --json --list`` of libnbd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pynbd.client.connecting import connect, list_exports
from pynbd.errors import OptionError
from pynbd.protocol.handshake_client import RemoteExport
from pynbd.protocol.uri import NbdUri
from pynbd.protocol.values import TransmissionFlag

Info = dict[str, Any]

_CAPABILITIES = {
    "is_rotational": TransmissionFlag.ROTATIONAL,
    "is_read_only": TransmissionFlag.READ_ONLY,
    "can_block_status_payload": TransmissionFlag.BLOCK_STATUS_PAYLOAD,
    "can_cache": TransmissionFlag.SEND_CACHE,
    "can_df": TransmissionFlag.SEND_DF,
    "can_fast_zero": TransmissionFlag.SEND_FAST_ZERO,
    "can_flush": TransmissionFlag.SEND_FLUSH,
    "can_fua": TransmissionFlag.SEND_FUA,
    "can_multi_conn": TransmissionFlag.CAN_MULTI_CONN,
    "can_trim": TransmissionFlag.SEND_TRIM,
    "can_zero": TransmissionFlag.SEND_WRITE_ZEROES,
}
_BLOCK_SIZES = ("block_size_minimum", "block_size_preferred", "block_size_maximum")
_ALL_KNOWN = ("base:", "qemu:")
_SUFFIXES = "KMGTPE"


async def exports_of(uri: str) -> Sequence[RemoteExport]:
    """The export that a URI names; all that the server lists, where it names none.

    `OptionError` if there is no such export.
    """
    wanted = NbdUri.parse(uri).export
    try:
        listed = await list_exports(uri)
    except OptionError:  # it does not list, but may serve
        listed = []
    found = [export for export in listed if not wanted or export.name == wanted]
    if found:
        return found
    async with connect(uri, contexts=_ALL_KNOWN) as client:
        assert isinstance(client.info, RemoteExport)
        return [client.info]


async def server_info(uri: str) -> Info:
    """What there is to know about the server of a URI, and the exports that it names."""
    where = NbdUri.parse(uri)
    exports = await exports_of(uri)
    return {
        "protocol": "newstyle-fixed",
        "TLS": where.tls,
        "structured": exports[0].structured or exports[0].extended,
        "extended": exports[0].extended,
        "exports": [export_info(export, where) for export in exports],
    }


def export_info(export: RemoteExport, server: NbdUri) -> Info:
    """One export of the server that the URI ``server`` leads to."""
    info: Info = {"export-name": export.name}
    if export.description:
        info["description"] = export.description
    info["uri"] = str(replace(server, export=export.name))
    info["contexts"] = list(export.contexts)
    info |= {name: flag in export.flags for name, flag in _CAPABILITIES.items()}
    if export.constrained:
        info |= zip(_BLOCK_SIZES, export.block_size, strict=True)
    info["export-size"] = export.size
    info["export-size-str"] = _exact_in_units(export.size)
    return info


def _exact_in_units(size: int) -> str:
    """In the largest unit of which it is a multiple, as nbdkit writes sizes."""
    suffix = ""
    for larger in _SUFFIXES:
        if size % 1024 or not size:
            break
        size, suffix = size // 1024, larger
    return f"{size}{suffix}"
