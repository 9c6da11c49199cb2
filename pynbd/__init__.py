"""An NBD server for raw and qcow2 images, with every part of the protocol.

The program is ``pynbd serve``; this is the same from Python::

    import asyncio

    import pynbd


    async def main() -> None:
        async with pynbd.serve("disk.qcow2", read_only=True) as server:
            print(server.uri)
            await server.ended()


    asyncio.run(main())

Everything that is promised stands in ``__all__``; other modules may change. What is asked for is
imported then, and not before: `import pynbd` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pynbd.errors import (
    CorruptImage,
    DiskError,
    ImageError,
    ImageLocked,
    MapError,
    OptionError,
    ProtocolError,
    PynbdError,
    ReadError,
    RequestError,
    TlsError,
    UnsupportedFeature,
    UsageError,
    WriteError,
)

if TYPE_CHECKING:
    from pynbd.block.bitmap import DirtyBitmap
    from pynbd.block.cache_modes import Cache
    from pynbd.block.chain import open_image
    from pynbd.block.creation import create_image
    from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, UNALLOCATED, ZERO, Runs
    from pynbd.block.limits import ImageLimits
    from pynbd.block.node import BlockNode
    from pynbd.client.connecting import connect, list_exports
    from pynbd.client.connection import Client
    from pynbd.protocol.values import State
    from pynbd.server.access import Allow
    from pynbd.server.contexts import standard_contexts
    from pynbd.server.disk import Disk, StatusMethod
    from pynbd.server.export import Export, ExportTable
    from pynbd.server.limits import Limits
    from pynbd.server.listening import listen_tcp, listen_unix
    from pynbd.server.server import Server
    from pynbd.server.serving import Serving, serve
    from pynbd.server.tls import Tls

__all__ = [
    "COMPRESSED",
    "CORRUPT",
    "DATA",
    "UNALLOCATED",
    "ZERO",
    "Allow",
    "BlockNode",
    "Cache",
    "Client",
    "CorruptImage",
    "DirtyBitmap",
    "Disk",
    "DiskError",
    "Export",
    "ExportTable",
    "ImageError",
    "ImageLimits",
    "ImageLocked",
    "Limits",
    "MapError",
    "OptionError",
    "ProtocolError",
    "PynbdError",
    "ReadError",
    "RequestError",
    "Runs",
    "Server",
    "Serving",
    "State",
    "StatusMethod",
    "Tls",
    "TlsError",
    "UnsupportedFeature",
    "UsageError",
    "WriteError",
    "connect",
    "create_image",
    "list_exports",
    "listen_tcp",
    "listen_unix",
    "open_image",
    "serve",
    "standard_contexts",
]

_HOMES = {
    "COMPRESSED": "pynbd.block.extent",
    "CORRUPT": "pynbd.block.extent",
    "DATA": "pynbd.block.extent",
    "UNALLOCATED": "pynbd.block.extent",
    "ZERO": "pynbd.block.extent",
    "Allow": "pynbd.server.access",
    "BlockNode": "pynbd.block.node",
    "Cache": "pynbd.block.cache_modes",
    "Client": "pynbd.client.connection",
    "DirtyBitmap": "pynbd.block.bitmap",
    "Disk": "pynbd.server.disk",
    "Export": "pynbd.server.export",
    "ExportTable": "pynbd.server.export",
    "ImageLimits": "pynbd.block.limits",
    "Limits": "pynbd.server.limits",
    "Runs": "pynbd.block.extent",
    "Server": "pynbd.server.server",
    "Serving": "pynbd.server.serving",
    "State": "pynbd.protocol.values",
    "StatusMethod": "pynbd.server.disk",
    "Tls": "pynbd.server.tls",
    "connect": "pynbd.client.connecting",
    "create_image": "pynbd.block.creation",
    "list_exports": "pynbd.client.connecting",
    "listen_tcp": "pynbd.server.listening",
    "listen_unix": "pynbd.server.listening",
    "open_image": "pynbd.block.chain",
    "serve": "pynbd.server.serving",
    "standard_contexts": "pynbd.server.contexts",
}

if not TYPE_CHECKING:  # a type checker has to notice a name that is not there

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return __all__
