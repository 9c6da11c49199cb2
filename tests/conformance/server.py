"""A server with exports for every row: ``python -m tests.conformance.server [options] SOCKET DIR``.

It builds its images in DIR, listens on SOCKET and then prints ``ready``. SIGTERM ends it in good
order; SIGUSR1 lets it answer as one that shuts down, and SIGUSR2 as before.

    raw        the default export: writable, 5 GiB, described by the constants below
    ro         a read-only raw file of 1 MiB: `pattern` in [0, 512 KiB), a hole in the rest
    qcow2      a chain of three layers with bitmaps, see `CHAIN_*` and `BITMAPS`
    empty      0 bytes, writable
    odd        1000 bytes of `pattern`, writable
    größe 名前  as ro
    described  as ro, with a description
    single     as ro, for one connection only
    broken     a qcow2 image with damaged clusters, see `BROKEN_*`
    fragments  a qcow2 image of `FRAGMENTS` extents, data and holes in turn
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import uvloop

from pynbd.block.chain import open_image
from pynbd.block.qcow2 import builder
from pynbd.block.qcow2.builder import Compressed, Data, Image, Zero
from pynbd.server.access import Identity
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.listening import listen_unix
from pynbd.server.server import Server

RAW_SIZE = 5 << 30
RAW_DATA = [(0, 1 << 20), (2 << 20, 64 << 10), (RAW_SIZE - 4096, 4096)]
"""(offset, length) of what holds `pattern`; the rest is a hole."""
RAW_SCRATCH = (16 << 20, 2 << 30)
"""[start, end) that tests may write to. It begins as a hole; nothing else of ``raw`` changes."""

RO_SIZE = 1 << 20
RO_DATA = 512 << 10
ODD_SIZE = 1000
UNICODE = "größe 名前"
DESCRIPTION = "a description – with “UTF-8”"

CLUSTER = 64 << 10
CHAIN_TOP = "DZC......Z......"
CHAIN_MIDDLE = "...DD...Z......."
CHAIN_BASE = "D....DD....D"
"""The clusters of the layers of ``qcow2``: data, compressed, zero; a dot is unallocated. The base
is a shorter raw file, and its dots are holes. Data clusters of layer n are full of byte n."""
CHAIN_SIZE = len(CHAIN_TOP) * CLUSTER
CHAIN_CONTENTS = b"".join(bytes([n]) * CLUSTER for n in b"\1\0\1\2\2\3\3\0\0\0\0\3\0\0\0\0")
CHAIN_ALLOCATION = [(1, 0), (1, 3), (5, 0), (4, 3), (1, 0), (4, 3)]
CHAIN_DEPTH = [(3, 1), (2, 2), (3, 3), (1, 2), (1, 1), (6, 3)]
"""What the contexts say of ``qcow2``: (clusters, status)."""

LONG_NAME = "n" * 1023
BITMAPS = {
    "plain": [(0, CLUSTER), (4 * CLUSTER, 3 * CLUSTER)],
    "with:colons::in:it:": [(0, CHAIN_SIZE)],
    UNICODE: [(CLUSTER, CLUSTER)],
    LONG_NAME: [],
}
"""The dirty ranges (offset, length) of the bitmaps of ``qcow2``, at a granularity of `CLUSTER`."""
CHAIN_CONTEXTS = [
    "base:allocation",
    "qemu:allocation-depth",
    *(f"qemu:dirty-bitmap:{name}" for name in BITMAPS),
]

BROKEN_STREAM, BROKEN_ENTRY, BROKEN_NOT = 0, CLUSTER, 2 * CLUSTER
"""Guest offsets in ``broken``: of a compressed cluster that cannot be decoded, of a cluster whose
L2 entry is unaligned, and of sound data, `pattern`. What follows is unallocated."""
BROKEN_SIZE = 8 * CLUSTER

FRAGMENT = 64 << 10
FRAGMENTS = 1 << 18


def pattern(offset: int, length: int) -> bytes:
    """Bytes that tell where they are: each 8 are the complement of their offset."""
    first, last = offset // 8, -(-(offset + length) // 8)
    words = struct.pack(f">{last - first}Q", *(~(8 * at) & 2**64 - 1 for at in range(first, last)))
    return words[offset - 8 * first :][:length]


def _sparse(path: Path, size: int, contents: Mapping[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in contents.items():
            file.seek(offset)
            file.write(data)
    return path


def _clusters(drawing: str, layer: int) -> dict[int, builder.Cluster]:
    data = bytes([layer]) * CLUSTER
    kinds: dict[str, builder.Cluster] = {"D": Data(data), "C": Compressed(data), "Z": Zero()}
    return {at * CLUSTER: kinds[kind] for at, kind in enumerate(drawing) if kind != "."}


def _build_chain(folder: Path) -> Path:
    base = {at * CLUSTER: b"\3" * CLUSTER for at, kind in enumerate(CHAIN_BASE) if kind == "D"}
    _sparse(folder / "base.raw", len(CHAIN_BASE) * CLUSTER, base)
    middle = Image(
        size=CHAIN_SIZE,
        clusters=_clusters(CHAIN_MIDDLE, 2),
        backing_file="base.raw",
        backing_format="raw",
    )
    middle.write(folder / "middle.qcow2")
    top = Image(
        size=CHAIN_SIZE,
        clusters=_clusters(CHAIN_TOP, 1),
        backing_file="middle.qcow2",
        backing_format="qcow2",
        bitmaps=[
            builder.Bitmap(name, granularity=CLUSTER, dirty=dirty)
            for name, dirty in BITMAPS.items()
        ],
    )
    top.write(folder / "top.qcow2")
    return folder / "top.qcow2"


def _build_broken(folder: Path) -> Path:
    path = folder / "broken.qcow2"
    clusters: dict[int, builder.Cluster] = {
        BROKEN_STREAM: Compressed(stream=b"\xff" * 512),
        BROKEN_ENTRY: Data(b"lost"),
        BROKEN_NOT: Data(pattern(BROKEN_NOT, CLUSTER)),
    }
    written = Image(size=BROKEN_SIZE, clusters=clusters).write(path)
    entry_at = written.entry_offset(BROKEN_ENTRY)
    entry = int.from_bytes(path.read_bytes()[entry_at : entry_at + 8])
    builder.poke(path, entry_at, (entry | 0x200).to_bytes(8))
    return path


def _build_fragments(folder: Path) -> Path:
    builder.large_map(folder / "fragments.qcow2", FRAGMENTS * FRAGMENT, cluster_bits=16)
    return folder / "fragments.qcow2"


async def _exports(folder: Path) -> dict[str, Export]:
    raw = _sparse(folder / "raw", RAW_SIZE, {at: pattern(at, length) for at, length in RAW_DATA})
    ro = _sparse(folder / "ro", RO_SIZE, {0: pattern(0, RO_DATA)})
    odd = _sparse(folder / "odd", ODD_SIZE, {0: pattern(0, ODD_SIZE)})
    empty = _sparse(folder / "empty", 0, {})
    exports: dict[str, Export] = {}

    async def add(
        name: str,
        path: Path,
        *,
        writable: bool = False,
        description: str = "",
        multi_conn: bool = True,
    ) -> None:
        form = "qcow2" if path.suffix == ".qcow2" else "raw"
        node = await open_image(path, format=form, read_only=not writable)
        contexts = standard_contexts(depth=True, bitmaps=node.bitmaps())
        exports[name] = Export(
            name, node, description=description, contexts=contexts, multi_conn=multi_conn
        )

    await add("raw", raw, writable=True)
    await add("ro", ro)
    await add("qcow2", _build_chain(folder))
    await add("empty", empty, writable=True)
    await add("odd", odd, writable=True)
    await add(UNICODE, ro)
    await add("described", ro, description=DESCRIPTION)
    await add("single", ro, multi_conn=False)
    await add("broken", _build_broken(folder))
    await add("fragments", _build_fragments(folder))
    return exports


class _Unlisted(ExportTable):
    def listing(self, client: Identity) -> None:
        return None


async def _serve(arguments: argparse.Namespace) -> None:
    exports = await _exports(arguments.folder)
    kind = _Unlisted if arguments.unlisted else ExportTable
    table = kind([] if arguments.no_exports else exports.values())
    listener = listen_unix(str(arguments.socket))
    server = Server(
        table,
        [listener],
        limits=Limits(handshake_seconds=arguments.handshake_limit),
        extended=not arguments.no_extended_headers,
    )

    def answer_as_stopping(stopping: bool) -> None:
        table.stopping = stopping

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: server.stop,
        signal.SIGUSR1: lambda: answer_as_stopping(True),
        signal.SIGUSR2: lambda: answer_as_stopping(False),
    }
    for number, handler in handlers.items():
        asyncio.get_running_loop().add_signal_handler(number, handler)
    print("ready", flush=True)
    await server.run()
    for export in exports.values():
        await export.node.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop")
    parser.add_argument("--handshake-limit", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--no-exports", action="store_true")
    parser.add_argument("--unlisted", action="store_true", help="LIST is not allowed")
    parser.add_argument("--no-extended-headers", action="store_true")
    parser.add_argument("socket", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="pynbd: %(message)s")
    run = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    run(_serve(arguments))


if __name__ == "__main__":
    main()
