"""A server with TLS: ``python -m tests.conformance.tls_server [options] SOCKET DIR``.

It listens on SOCKET and on a TCP port of 127.0.0.1, which it writes into DIR/port, and then prints
``ready``. Its log goes to standard error, with who comes and goes. SIGTERM ends it in good order.

Each export is a raw file of its own in DIR, with `pattern` at its beginning; `RULES` says who may
do what. The first one is the default export.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import uvloop

from pynbd.block.chain import open_image
from pynbd.server.access import Allow
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.listening import listen_tcp, listen_unix
from pynbd.server.server import Server
from pynbd.server.tls import Tls
from tests.conformance.server import pattern

SIZE = 64 << 20
DATA = 64 << 10
"""How much of an export holds `pattern`; the rest is a hole at first."""

UID, GID = os.geteuid(), os.getegid()
CAROL = "C=GB,ST=Essex,L=Colchester,O=Example,CN=carol"
READ_ONLY = frozenset({"read-only-file"})
"""Nobody writes to these, whatever the rules say."""
RULES: dict[str, Sequence[Allow] | None] = {
    "disk": None,
    "nobody": [],
    "readers": [Allow("read")],
    "read-only-file": [Allow("write")],
    "tls": [Allow("write", tls=True)],
    "clear": [Allow("write", tls=False)],
    "tls-writes": [Allow("read"), Allow("write", tls=True)],
    "uid": [Allow("write", uid=UID)],
    "other-uid": [Allow("write", uid=UID + 1)],
    "gid": [Allow("read", gid=GID)],
    "network": [Allow("write", address="127.0.0.0/8")],
    "elsewhere": [Allow("write", address="192.0.2.0/24")],
    "alice": [Allow("write", cert="alice")],
    "alice-reads": [Allow("read", cert="alice"), Allow("write", cert="bob")],
    "carol": [Allow("write", dn=CAROL)],
    "example": [Allow("read", dn="C=GB,*,O=Example,CN=*")],
    "psk": [Allow("write", psk="alice"), Allow("read", psk="bob")],
    "alice-far": [Allow("write", cert="alice", address="127.0.0.1"), Allow("read", cert="alice")],
}


async def _exports(folder: Path) -> list[Export]:
    exports = []
    for name, rules in RULES.items():
        path = folder / name
        with path.open("wb") as file:
            file.write(pattern(0, DATA))
            file.truncate(SIZE)
        node = await open_image(path, format="raw", read_only=name in READ_ONLY)
        contexts = standard_contexts(depth=True, bitmaps=[])
        exports.append(Export(name, node, contexts=contexts, access=rules))
    return exports


def _tls(arguments: argparse.Namespace) -> Tls:
    authorized = arguments.authorize
    return Tls(
        certificates=arguments.certificates,
        psk_file=arguments.psk,
        verify_peer=arguments.verify_peer,
        required=not arguments.optional,
        authorize=(lambda name: name == authorized) if authorized else None,
    )


async def _serve(arguments: argparse.Namespace) -> None:
    exports = await _exports(arguments.folder)
    near, far = listen_unix(str(arguments.socket)), listen_tcp("127.0.0.1", 0)
    limits = Limits(handshake_seconds=arguments.handshake_limit)
    tls = None if arguments.no_tls else _tls(arguments)
    server = Server(ExportTable(exports), [near, *far], limits=limits, tls=tls)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    (arguments.folder / "port").write_text(str(far[0].getsockname()[1]))
    print("ready", flush=True)
    await server.run()
    for export in exports:
        await export.node.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop")
    parser.add_argument("--handshake-limit", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--no-tls", action="store_true", help="NOTLS")
    parser.add_argument("--certificates", type=Path, metavar="DIR")
    parser.add_argument("--psk", type=Path, metavar="FILE")
    parser.add_argument("--verify-peer", action="store_true")
    parser.add_argument("--optional", action="store_true", help="SELECTIVETLS, else FORCEDTLS")
    parser.add_argument("--authorize", metavar="DN")
    parser.add_argument("socket", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="pynbd: %(message)s")
    run = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    run(_serve(arguments))


if __name__ == "__main__":
    main()
