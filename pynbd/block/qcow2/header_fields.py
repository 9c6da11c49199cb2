"""The fields of a header that change while the image is open, each written by itself.

docs/interop/qcow2.rst, "Header". All of them are in the first 512 bytes of the file and are written
with one call each, so that a crash leaves the old value or the new one.
"""

from __future__ import annotations

import asyncio
import struct

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.format import (
    AUTOCLEAR_OFFSET,
    INCOMPATIBLE_OFFSET,
    REFCOUNT_TABLE_FIELDS,
    REFCOUNT_TABLE_FIELDS_OFFSET,
    Autoclear,
    Incompatible,
)
from pynbd.block.qcow2.header import Header

_BITS = struct.Struct(">Q")


class HeaderFields:
    """The header of ``file``. A field that could not be written keeps its value. Only version 3
    has feature bits.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self.cluster_bits = header.cluster_bits
        self.version = header.version
        self.incompatible = header.incompatible
        self.autoclear = header.autoclear
        self._one_at_a_time = asyncio.Lock()

    async def set_incompatible(self, bit: Incompatible, *, on: bool) -> None:
        async with self._one_at_a_time:
            bits = self.incompatible | bit if on else self.incompatible & ~bit
            await self._file.write(_BITS.pack(bits), INCOMPATIBLE_OFFSET)
            self.incompatible = bits

    async def set_autoclear(self, bits: Autoclear) -> None:
        await self._file.write(_BITS.pack(bits), AUTOCLEAR_OFFSET)
        self.autoclear = bits

    async def place_refcount_table(self, host_offset: int, length: int) -> None:
        """``length`` is in bytes, whole clusters."""
        fields = REFCOUNT_TABLE_FIELDS.build(
            {
                "refcount_table_offset": host_offset,
                "refcount_table_clusters": length >> self.cluster_bits,
            }
        )
        await self._file.write(fields, REFCOUNT_TABLE_FIELDS_OFFSET)
