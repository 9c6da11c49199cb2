"""Pins: host ranges that requests under way still use.

A read or an in-place write maps first and does its I/O later. If it waits in between, somebody may
free the cluster that it was mapped to, and another may take it: the late bytes would be read from,
or land in, somebody else's data. So whoever waits holds pins from `map` to the last system call,
and a freed cluster is punched or used again only when nothing `holds` it. What is mapped and done
in one step of the loop needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pynbd.block.extent import Extent


class Pins:
    """The pinned host ranges of one image."""

    def __init__(self) -> None:
        # Few are held at a time, as many as there are extents in flight: a search through all is
        # cheap.
        self._held: dict[int, list[Extent]] = {}
        self._last = 0

    @contextmanager
    def hold(self, extents: Iterable[Extent]) -> Iterator[None]:
        """Keep the host clusters of plain extents from being used again."""
        self._last += 1
        number = self._last
        self._held[number] = [extent for extent in extents if extent.file is not None]
        try:
            yield
        finally:
            del self._held[number]

    def holds(self, file: object, host_offset: int, length: int) -> bool:
        """Whether a request under way uses any byte of a range of ``file``."""
        return any(
            extent.file is file
            and extent.host < host_offset + length
            and host_offset < extent.host + extent.end - extent.offset
            for extents in self._held.values()
            for extent in extents
        )
