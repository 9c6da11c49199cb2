"""Exports: the transmission flags of rows F1 to F8 (as QEMU sets them), and names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.errors import ImageError
from pynbd.server.access import Allow, Identity
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable


@asynccontextmanager
async def opened(tmp_path: Path, *, read_only: bool) -> AsyncIterator[BlockNode]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4097))
    node = await open_image(path, format="raw", read_only=read_only)
    try:
        yield node
    finally:
        await node.close()


@pytest.mark.parametrize(
    "read_only, multi_conn, flags",
    [(True, True, 0x50F), (False, True, 0xD6D), (True, False, 0x40F), (False, False, 0xC6D)],
)
async def test_flags(tmp_path: Path, read_only: bool, multi_conn: bool, flags: int) -> None:
    """Those of qemu-nbd in simple mode; negotiation adds SEND_DF and BLOCK_STATUS_PAYLOAD."""
    async with opened(tmp_path, read_only=read_only) as node:
        info = Export("x", node, contexts={}, multi_conn=multi_conn).info
        assert info.flags == flags


async def test_what_negotiation_is_told(tmp_path: Path) -> None:
    """Row O28: minimum 1, preferred 4096, maximum payload 32 MiB; the exact size."""
    async with opened(tmp_path, read_only=True) as node:
        contexts = standard_contexts(depth=True, bitmaps=())
        info = Export("x", node, description="text", contexts=contexts).info
        assert (info.name, info.description, info.size) == ("x", "text", 4097)
        assert info.block_size == (1, 4096, 32 << 20)
        assert info.contexts == ("base:allocation", "qemu:allocation-depth")


async def test_a_size_that_no_client_can_ask_for(tmp_path: Path) -> None:
    """Clients keep sizes and offsets in signed 64-bit integers."""
    async with opened(tmp_path, read_only=True) as node:
        node.size = 2**63 - 1
        assert Export("x", node, contexts={}).info.size == 2**63 - 1
        node.size = 2**63
        with pytest.raises(ImageError, match="9223372036854775808 bytes"):
            Export("x", node, contexts={})


async def test_the_first_export_is_the_default(tmp_path: Path) -> None:
    """Row O31."""
    async with opened(tmp_path, read_only=True) as node:
        first, second = (Export(name, node, contexts={}) for name in ("first", "second"))
        table = ExportTable([first, second])
        anybody = Identity()
        assert table.find("first", anybody) is table.find("", anybody) is first
        assert table.find("second", anybody) is second
        assert table.find("third", anybody) is None
        assert list(table) == table.listing(anybody) == [first, second]
        unnamed = Export("", node, contexts={})
        assert ExportTable([second, unnamed]).find("", anybody) is unnamed
    assert ExportTable([]).find("", anybody) is None


async def test_an_export_that_nobody_may_have_is_in_the_table(tmp_path: Path) -> None:
    async with opened(tmp_path, read_only=True) as node:
        table = ExportTable([Export("x", node, contexts={}, access=[])])
        assert [table.find(name, Identity()) for name in ("x", "", "y")] == [None] * 3
        assert [name in table for name in ("x", "", "y")] == [True, True, False]


async def test_rules_stay_as_they_were(tmp_path: Path) -> None:
    """What a client has found must not be gone when it enters."""
    async with opened(tmp_path, read_only=False) as node:
        rules = [Allow("read")]
        export = Export("x", node, contexts={}, access=rules)
        rules[:] = []
        seen = export.seen_by(Identity())
        assert seen
        assert seen.read_only
