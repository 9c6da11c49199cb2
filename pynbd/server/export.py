"""Exports: an image under a name, with what clients are told of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Self

from pynbd.block.node import BlockNode
from pynbd.errors import ImageError
from pynbd.protocol.handshake import ExportInfo
from pynbd.protocol.strings import check_string
from pynbd.protocol.values import MAX_EXPORT_SIZE, MAX_PAYLOAD, TransmissionFlag
from pynbd.server.access import Allow, Identity, Right, right_of
from pynbd.server.contexts import Context
from pynbd.server.troubles import TroubleLog
from pynbd.server.zeroes import DetectZeroes

_ALWAYS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
_WRITABLE = TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


class Export:
    """A node that clients may open under ``name``.

    ``contexts``: the metadata contexts on offer, by name, in the order of their ids.
    ``multi_conn``: whether a second connection sees what the first one wrote; one process with one
    node always grants that, but it is pointless where only one connection is allowed. ``unmap``:
    whether TRIM and WRITE_ZEROES may give space back; else TRIM does nothing, and succeeds.
    ``reserve``: whether WRITE_ZEROES with NO_HOLE adds the space that is not there yet.
    ``detect_zeroes``: what becomes of writes of nothing but zeroes. ``access``: who may read it,
    and who may write; None is everybody. Raises `ImageError` if the image is larger than an export
    can be, `UsageError` for a text that no client can be told.
    """

    def __init__(
        self,
        name: str,
        node: BlockNode,
        *,
        description: str = "",
        contexts: Mapping[str, Context],
        multi_conn: bool = True,
        unmap: bool = True,
        reserve: bool = True,
        detect_zeroes: DetectZeroes = DetectZeroes.OFF,
        access: Sequence[Allow] | None = None,
    ) -> None:
        check_string("export name", name)
        check_string("description", description)
        if node.size > MAX_EXPORT_SIZE:
            raise ImageError(f"{node.name}: of its {node.size} bytes no client could ask for all")
        self.name = name
        self.node = node
        self.contexts = contexts
        self.read_only = node.read_only
        self.unmap = unmap
        self.reserve = reserve
        self.detect_zeroes = detect_zeroes
        self._access = None if access is None else tuple(access)
        self.troubles = TroubleLog()
        flags = _ALWAYS | (TransmissionFlag.READ_ONLY if node.read_only else _WRITABLE)
        if node.can_discard and not node.read_only:
            flags |= TransmissionFlag.SEND_TRIM
        if node.can_prefetch:
            flags |= TransmissionFlag.SEND_CACHE
        if multi_conn:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        self.info = ExportInfo(
            name=name,
            description=description,
            size=node.size,
            flags=flags,
            block_size=(1, node.preferred_block_size, MAX_PAYLOAD),
            contexts=tuple(contexts),
        )

    def seen_by(self, client: Identity) -> Self | None:
        """This export as ``client`` is to see it; None: there is none for him."""
        right = right_of(self._access, client)
        if right is Right.NOTHING:
            return None
        return self if right is Right.WRITE or self.read_only else self._for_readers

    @cached_property
    def _for_readers(self) -> Self:
        """The same, for those who may not write."""
        view = copy(self)
        view.read_only = True
        flags = self.info.flags & ~(_WRITABLE | TransmissionFlag.SEND_TRIM)
        view.info = replace(self.info, flags=flags | TransmissionFlag.READ_ONLY)
        return view


class ExportTable:
    """The exports of a server. The first one is the default export."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self._exports = {export.name: export for export in exports}
        self.stopping = False

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def __contains__(self, name: str) -> bool:
        """Whether there is an export of this name, for whomever; no client is told that."""
        return self._named(name) is not None

    def find(self, name: str, client: Identity) -> Export | None:
        """The export of this name as ``client`` is to see it; "" is also the default export."""
        export = self._named(name)
        return export.seen_by(client) if export else None

    def _named(self, name: str) -> Export | None:
        export = self._exports.get(name)
        if export is None and not name:
            export = next(iter(self._exports.values()), None)
        return export

    def listing(self, client: Identity) -> list[Export] | None:
        """Those that there are for ``client``; None from a table that forbids listing."""
        seen = (export.seen_by(client) for export in self._exports.values())
        return [export for export in seen if export]
