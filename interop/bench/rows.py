"""The table: what is served, how, what a client does with it, and what is wanted of pynbd.

Each row wants a ratio to the best of its rivals, which is above 1 where pynbd is the better one.
Where nobody else is to be compared with, the rival is a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from interop.bench import images, jobs, tables
from interop.bench.jobs import Job, filling, steady
from interop.bench.servers import NBDKIT, QEMU, Way

RAW = Way("raw")
QCOW2 = Way()
READ_ONLY = Way(read_only=True)
TCP = Way(tcp=True)
RAW_TCP = Way("raw", tcp=True)
TLS = Way(tcp=True, tls=True)
RAW_TLS = Way("raw", tcp=True, tls=True)
RAW_TLS_UNIX = Way("raw", tls=True)
DEPTH = Way(read_only=True, contexts=("-A",))
BITMAP = Way(read_only=True, contexts=("-B", tables.BITMAPS[0]))
EIGHT = Way(read_only=True, contexts=("-A", *(f"-B{name}" for name in tables.BITMAPS)))
DEPTHS = "qemu:allocation-depth"
DIRTY = f"qemu:dirty-bitmap:{tables.BITMAPS[0]}"

# Bytes written to what is empty: so few small ones that three of four meet a new cluster.
SMALL = 16384 * 4096
COPIED = 10000 * 4096  # into the overlay, which is smaller
LARGE = 1 << 30
NEW = images.EMPTY_SIZE
PACKED = images.COMPRESSED_SIZE
FAR = tables.FRAGMENTED_SIZE
KEPT = 80.0  # MiB of memory, beside what is in flight
LIMIT = "limit"


@dataclass(frozen=True)
class Row:
    name: str
    image: Callable[[], Path]
    way: Way
    job: Job
    required: float = 1.0
    limit: float | None = None  # in place of rivals
    quick: bool = False  # it stands for its group in a quick run

    @property
    def rivals(self) -> tuple[str, ...]:
        if self.limit is not None:
            return (LIMIT,)
        return (*QEMU, NBDKIT) if self.way.form == "raw" else QEMU


ROWS = (
    Row("raw randread 4k qd1", images.raw, RAW, steady("randread", "4k", 1), 1.0),
    Row("raw randread 4k qd16", images.raw, RAW, steady("randread", "4k", 16), 1.5, quick=True),
    Row("raw randread 4k qd64", images.raw, RAW, steady("randread", "4k", 64), 1.5),
    Row("raw read 256k qd16", images.raw, RAW, steady("read", "256k", 16), 1.3),
    Row("raw read 1M qd8", images.raw, RAW, steady("read", "1M", 8), 1.3),
    Row("raw randwrite 4k qd16", images.written_raw, RAW, steady("randwrite", "4k", 16), 1.0),
    Row("raw write 1M qd4", images.written_raw, RAW, steady("write", "1M", 4), 1.0, quick=True),
    Row("qcow2 randread 4k qd1", images.qcow2, QCOW2, steady("randread", "4k", 1), 1.0),
    Row(
        "qcow2 randread 4k qd16", images.qcow2, QCOW2, steady("randread", "4k", 16), 1.7, quick=True
    ),
    Row("qcow2 randread 4k qd64", images.qcow2, QCOW2, steady("randread", "4k", 64), 1.8),
    Row("qcow2 read 1M qd8", images.qcow2, QCOW2, steady("read", "1M", 8), 1.2),
    Row("qcow2 read-only read 1M qd8", images.qcow2, READ_ONLY, steady("read", "1M", 8), 1.5),
    Row("chain read 1M qd8", images.chain, READ_ONLY, steady("read", "1M", 8), 1.5),
    Row(
        "chain randread 4k qd16",
        images.chain,
        READ_ONLY,
        steady("randread", "4k", 16),
        1.8,
        quick=True,
    ),
    Row(
        "fragmented randread 4k qd16",
        images.fragmented,
        READ_ONLY,
        steady("randread", "4k", 16, FAR),
        1.7,
    ),
    Row(
        "in place randwrite 4k qd16",
        images.written_qcow2,
        QCOW2,
        steady("randwrite", "4k", 16),
        1.2,
        quick=True,
    ),
    Row("in place write 1M qd4", images.written_qcow2, QCOW2, steady("write", "1M", 4), 1.2),
    Row(
        "empty randwrite 4k qd16",
        images.empty,
        QCOW2,
        filling("randwrite", "4k", 16, SMALL, NEW),
        1.0,
        quick=True,
    ),
    Row(
        "empty randwrite 64k qd16",
        images.empty,
        QCOW2,
        filling("randwrite", "64k", 16, LARGE, NEW),
        1.0,
    ),
    Row("empty write 1M qd4", images.empty, QCOW2, filling("write", "1M", 4, LARGE, NEW), 1.0),
    Row(
        "overlay randwrite 4k qd16",
        images.overlay,
        QCOW2,
        filling("randwrite", "4k", 16, COPIED),
        1.0,
    ),
    Row("zlib read 1M qd4", images.zlib, QCOW2, steady("read", "1M", 4, PACKED), 2.0),
    Row("zlib randread 4k qd16", images.zlib, QCOW2, steady("randread", "4k", 16, PACKED), 2.0),
    Row("zstd read 1M qd4", images.zstd, QCOW2, steady("read", "1M", 4, PACKED), 2.0),
    Row(
        "zstd randread 4k qd16",
        images.zstd,
        QCOW2,
        steady("randread", "4k", 16, PACKED),
        2.0,
        quick=True,
    ),
    Row("depth map, server", images.tebibyte, DEPTH, jobs.map_cpu(DEPTHS), 4.0, quick=True),
    Row("depth map, whole run", images.tebibyte, DEPTH, jobs.map_time(DEPTHS), 1.4),
    Row("bitmap map, server", images.bitmaps, BITMAP, jobs.map_cpu(DIRTY), 4.0),
    Row("bitmap map, whole run", images.bitmaps, BITMAP, jobs.map_time(DIRTY), 1.4),
    Row("nbdcopy, 1 connection", images.qcow2, QCOW2, jobs.copying(1), 1.3, quick=True),
    Row("nbdcopy, 4 connections", images.qcow2, QCOW2, jobs.copying(4), 1.3),
    Row(
        "4 connections randread 4k qd16",
        images.qcow2,
        QCOW2,
        steady("randread", "4k", 16, connections=4),
        1.3,
    ),
    Row(
        "randread 4k beside flushes",
        images.written_qcow2,
        QCOW2,
        jobs.beside_flushes(),
        1.0,
        quick=True,
    ),
    Row("TCP raw randread 4k qd16", images.raw, RAW_TCP, steady("randread", "4k", 16), 1.3),
    Row("TCP raw read 1M qd8", images.raw, RAW_TCP, steady("read", "1M", 8), 1.3),
    Row(
        "TCP qcow2 randread 4k qd16",
        images.qcow2,
        TCP,
        steady("randread", "4k", 16),
        1.3,
        quick=True,
    ),
    Row("TCP qcow2 read 1M qd8", images.qcow2, TCP, steady("read", "1M", 8), 1.3),
    Row("TLS raw randread 4k qd16", images.raw, RAW_TLS, steady("randread", "4k", 16), quick=True),
    Row("TLS raw read 1M qd8", images.raw, RAW_TLS, steady("read", "1M", 8), quick=True),
    Row("TLS qcow2 randread 4k qd16", images.qcow2, TLS, steady("randread", "4k", 16)),
    Row("TLS qcow2 read 1M qd8", images.qcow2, TLS, steady("read", "1M", 8)),
    Row("TLS unix randread 4k qd16", images.raw, RAW_TLS_UNIX, steady("randread", "4k", 16)),
    Row("TLS unix read 1M qd8", images.raw, RAW_TLS_UNIX, steady("read", "1M", 8)),
    Row("one of eight contexts", images.bitmaps, EIGHT, jobs.filtered(), limit=4.0, quick=True),
    Row("listening", images.qcow2, QCOW2, jobs.startup(), limit=0.35, quick=True),
    Row(
        "memory, chain read 1M qd8",
        images.chain,
        READ_ONLY,
        jobs.memory(steady("read", "1M", 8)),
        limit=KEPT + 8,
    ),
    Row(
        "memory, zstd read 1M qd4",
        images.zstd,
        QCOW2,
        jobs.memory(steady("read", "1M", 4, PACKED)),
        limit=KEPT + 4,
    ),
    Row(
        "memory, fragmented randread 4k",
        images.fragmented,
        READ_ONLY,
        jobs.memory(steady("randread", "4k", 16, FAR)),
        limit=KEPT,
    ),
    Row(
        "memory, empty 1 TiB randwrite 4k",
        images.empty_tebibyte,
        QCOW2,
        jobs.memory(steady("randwrite", "4k", 16, 1 << 40)),
        limit=KEPT,
    ),
    Row("memory, depth map", images.tebibyte, DEPTH, jobs.memory(jobs.map_cpu(DEPTHS)), limit=KEPT),
    Row(
        "memory, 500 connections",
        images.qcow2,
        QCOW2,
        jobs.memory(jobs.crowded()),
        limit=200.0,
        quick=True,
    ),
)
