"""The ways in: `connect` to an export, and `list_exports` of a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from pynbd.client.connection import Client
from pynbd.client.negotiation import negotiate, parsed
from pynbd.errors import UnsupportedFeature
from pynbd.protocol.handshake_client import ABORT, RemoteExport, survey
from pynbd.protocol.uri import NbdUri


@asynccontextmanager
async def connect(
    uri: str | NbdUri,
    *,
    contexts: Sequence[str] = (),
    structured: bool = True,
    extended: bool = True,
) -> AsyncIterator[Client]:
    """A `Client` for an ``async with`` block::

        async with pynbd.connect("nbd://localhost", contexts=["base:allocation"]) as client:
            data = await client.pread(0, 512)

    ``contexts``: names of metadata contexts, each of which has to be there; or "base:", "qemu:"
    and the like for all that begin so, if any. ``structured``, ``extended``: whether structured
    replies and extended headers are asked for.

    Raises as `Client.open`, and `UnsupportedFeature` for a context that the export does not have.
    """
    async with await Client.open(
        uri, contexts=contexts, structured=structured, extended=extended
    ) as client:
        for name in contexts:
            if not name.endswith(":") and name not in client.contexts:
                there = ", ".join(client.contexts)
                raise UnsupportedFeature(
                    f"{client.name}: no metadata context {name!r}"
                    + (f"; of those asked for there are: {there}" if there else "")
                )
        yield client


async def list_exports(
    uri: str | NbdUri, *, structured: bool = True, extended: bool = True
) -> list[RemoteExport]:
    """What the server of ``uri`` lists, whatever export the URI names; ``contexts`` of each are
    those that it offers.

    Raises as `Client.open` does; `OptionError` also if the server does not list.
    """
    where = parsed(uri)
    stream, exports = await negotiate(
        where, survey(tls=where.tls, structured=structured, extended=extended)
    )
    try:
        with suppress(OSError):  # the server may have gone already
            await stream.write(ABORT)
    finally:
        stream.close()
    return exports
