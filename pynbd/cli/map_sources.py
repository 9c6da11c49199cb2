"""Whose block status a map shows: an image here, through the contexts that a server would offer, or
an export there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from pynbd.block.node import BlockNode
from pynbd.cli.export_info import exports_of
from pynbd.cli.map_rows import Statuses
from pynbd.client.connection import Client
from pynbd.errors import ImageError, PynbdError
from pynbd.protocol.metadata import (
    BASE_ALLOCATION,
    QEMU_ALLOCATION_DEPTH,
    QEMU_DIRTY_BITMAP,
    list_contexts,
)
from pynbd.server.contexts import block_status, standard_contexts
from pynbd.server.offers import offered_contexts

# Without a colon they cannot be names of contexts.
_SHORT = {"allocation": BASE_ALLOCATION, "depth": QEMU_ALLOCATION_DEPTH}

_SHOWN = 64


def full_names(contexts: Sequence[str]) -> list[str]:
    """What was asked for, each once and by its full name; base:allocation if nothing was."""
    return list(dict.fromkeys(_SHORT.get(name, name) for name in contexts)) or [BASE_ALLOCATION]


class ImageSource:
    """An open image. ``contexts``: those of `full_names` and wildcards; `ImageError` for one that
    is not there. A wildcard is for those of the image itself; a bitmap of a backing file, which
    knows nothing of the writes above it, has to be named.
    """

    def __init__(self, node: BlockNode, contexts: Sequence[str]) -> None:
        self._node = node
        self.size = node.size
        own = standard_contexts(depth=True, bitmaps=node.bitmaps())
        below = [
            name.removeprefix(QEMU_DIRTY_BITMAP)
            for name in contexts
            if name.startswith(QEMU_DIRTY_BITMAP) and not list_contexts(list(own), [name])
        ]
        offered = own | offered_contexts(node, bitmaps=below)
        missing, self.contexts = _matched(contexts, list(offered))
        if missing:
            raise ImageError(_not_there(node.name, missing, list(offered)))
        self._asked = dict(enumerate(offered[name] for name in self.contexts))

    async def status(self, offset: int, length: int) -> Statuses:
        answers = await block_status(self._node, self._asked, offset, length, one=False)
        return dict(zip(self.contexts, answers.values(), strict=True))


class ExportSource:
    """An export, through a connection that has negotiated ``contexts``."""

    def __init__(self, client: Client, contexts: Sequence[str]) -> None:
        self._client = client
        self.size = client.size
        self.contexts = contexts

    async def status(self, offset: int, length: int) -> Statuses:
        said = await self._client.block_status(offset, length, contexts=self.contexts)
        return {name: (status.lengths, status.flags) for name, status in said.items()}


@asynccontextmanager
async def export_source(uri: str, contexts: Sequence[str]) -> AsyncIterator[ExportSource]:
    """Connect to an export; `PynbdError` if a context is not there."""
    async with await Client.open(uri, contexts=contexts) as client:
        if not (client.structured or client.extended):
            raise PynbdError(f"{uri}: the server has only simple replies, and they tell no status")
        missing, found = _matched(contexts, client.contexts)
        if not missing:
            yield ExportSource(client, found)
            return
    # Its place is free again: the server may have one for a client at a time.
    raise PynbdError(_not_there(uri, missing, await _offered(uri, client.info.name)))


async def _offered(uri: str, name: str) -> list[str] | None:
    """The contexts of the export that a URI leads to, and which says that it is ``name``; None
    where nobody says which: the server may have been there for one client.
    """
    try:
        exports = await exports_of(uri)
    except (PynbdError, OSError):
        return None
    meant = [export for export in exports if export.name == name] or exports
    return list(dict.fromkeys(context for export in meant for context in export.contexts))


def _matched(wanted: Sequence[str], there: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of the queries match nothing, and the contexts that match any, in the order asked."""
    matches = {query: list_contexts(there, [query]) for query in wanted}
    missing = [query for query, found in matches.items() if not found]
    return missing, list(dict.fromkeys(name for found in matches.values() for name in found))


def _not_there(disk: str, missing: Sequence[str], there: Sequence[str] | None) -> str:
    text = f"{disk}: no metadata context {missing[0]!r}"
    if there is None:
        return text
    more = len(there) - _SHOWN
    listed = ", ".join([*there[:_SHOWN], *([f"{more} more"] if more > 0 else [])])
    return f"{text}; there are: {listed or 'none'}"
