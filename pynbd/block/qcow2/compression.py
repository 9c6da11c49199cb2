"""Compressed clusters (pure).

docs/interop/qcow2.rst, compression_type and "Compressed Clusters Descriptor". The data reaches to
the end of a sector, so what follows the stream is no error: "decompression stops when it has
produced a cluster of data". No more than that is ever produced.

The work is done outside the GIL, and each time that a thread wants it back may cost as much as a
tenth of a cluster: what known writers make, streams of exactly one cluster, goes through calls that
give it up once, and which cost little for each byte of the stream, whatever is in it; or goes on in
pieces as long as there is time. What these refuse is looked at again with care, which may take
long.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from time import perf_counter
from typing import Any

import zstandard
from deflate import DeflateError, deflate_decompress

from pynbd.block.engine import Buffer
from pynbd.block.qcow2.format import CompressionType
from pynbd.errors import CorruptImage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

inflater: Any  # a module like zlib
try:
    from isal import isal_zlib as inflater  # twice as fast, but for streams that make nothing
except ImportError:
    inflater = zlib

# QEMU has a window of 4 KiB both ways; the specification has no limit.
_WRITE_WINDOW = -12
_READ_WINDOW = -15
# Known writers make one; a cluster full of empty frames would take seconds.
_MAX_FRAMES = 1024


# Beyond this part of a cluster it is faster to decompress all of it with one call.
_MOST_INFLATED = 0.5 if inflater is zlib else 0.75
# The beginning of a stream holds the code of its first block, and the parts are not equally dense.
_PART_MORE = 512
# So much of it is inflated at a time: 1.6 ms if isal meets nothing but empty blocks.
_PIECE = 4 << 10
# Where all blocks are as short, and their codes as large, as can be, libdeflate takes 55 ns for a
# byte of the stream, libzstd half as long.
_UNZSTD_COST = 0.5
# So much of a stream is looked at before what there is of it is known to be of use.
_CHUNK = 64 << 10

# Contexts are as expensive as a part of a cluster. There are as many as threads that decompress.
_zstd_contexts: list[zstandard.ZstdDecompressor] = []


def cost(compression_type: CompressionType, stored: int, length: int, cluster_size: int) -> float:
    """What the longest call may cost that `decompress_all` makes for ``length`` bytes of a cluster
    whose stream has ``stored``: bytes of a whole stream of deflate. A stream may be nothing but
    empty blocks: the work cannot be told by what comes out.
    """
    if compression_type is CompressionType.ZSTD:
        return stored * _UNZSTD_COST
    if _begins(compression_type, length, cluster_size):
        return min(stored, _PIECE)
    return stored


def decompress_all(
    compression_type: CompressionType,
    streams: Sequence[tuple[memoryview, int]],
    cluster_size: int,
    patience: float = inf,
) -> list[Buffer | None]:
    """For each (stream, length): the first ``length`` bytes at least of the cluster of
    ``cluster_size`` bytes that it holds; None if it is not what known writers make, and needs the
    care of `decompress`, or if it takes more than ``patience`` seconds and can be interrupted.
    """
    if compression_type is CompressionType.ZSTD:
        return [*_unzstd_whole([stream for stream, _ in streams], cluster_size)]
    return [
        _inflate_beginning(stream, length, cluster_size, patience)
        if _begins(compression_type, length, cluster_size)
        else _inflate_whole(stream, cluster_size)
        for stream, length in streams
    ]


def _unzstd_whole(streams: Sequence[memoryview], cluster_size: int) -> list[bytes | None]:
    """Of streams that are one frame each, which tells that it holds a cluster."""
    try:
        context = _zstd_contexts.pop()
    except IndexError:  # others have them all; to look first would be too early
        context = zstandard.ZstdDecompressor()
    clusters: list[bytes | None] = []
    for stream in streams:
        cluster = None
        with suppress(zstandard.ZstdError):
            if zstandard.frame_content_size(stream) == cluster_size:
                cluster = context.decompress(stream)
        clusters.append(cluster)
    _zstd_contexts.append(context)
    return clusters


def decompress(compression_type: CompressionType, data: Buffer, cluster_size: int) -> Buffer:
    """The cluster of ``cluster_size`` bytes that ``data`` holds.

    Raises `CorruptImage`; its text does not name the file.
    """
    unpack = _unzstd if compression_type is CompressionType.ZSTD else _inflate
    try:
        cluster = unpack(data, cluster_size)
    except (inflater.error, zstd.ZstdError) as error:
        raise CorruptImage(f"the {compression_type} stream is damaged") from error
    if len(cluster) < cluster_size:
        raise CorruptImage(
            f"the {compression_type} stream ends after {len(cluster)} of {cluster_size} bytes"
        )
    return cluster


def _begins(compression_type: CompressionType, length: int, cluster_size: int) -> bool:
    """Whether it is less work to decompress but the beginning of a cluster."""
    return compression_type is CompressionType.ZLIB and length <= cluster_size * _MOST_INFLATED


def _inflate_beginning(
    stream: memoryview, length: int, cluster_size: int, patience: float
) -> bytes | None:
    """``length`` bytes or more, from as much of the stream; None if there are fewer."""
    part = len(stream) * length // cluster_size
    part = min(part + part // 16 + _PART_MORE, len(stream))
    inflating, until = inflater.decompressobj(_READ_WINDOW), perf_counter() + patience
    beginning: bytes = b""
    with suppress(inflater.error):
        for at in range(0, part, _PIECE):
            piece = stream[at : min(at + _PIECE, part)]
            beginning += inflating.decompress(piece, cluster_size - len(beginning))
            if len(beginning) >= length:
                return beginning
            if perf_counter() > until:
                return None
    return None


def _inflate_whole(stream: Buffer, cluster_size: int) -> Buffer | None:
    """Of a stream that ends with its cluster."""
    with suppress(DeflateError):
        if len(whole := deflate_decompress(stream, cluster_size)) == cluster_size:
            return whole
    return None


def _inflate(data: Buffer, cluster_size: int) -> Buffer:
    whole = _inflate_whole(data, cluster_size)
    return whole or inflater.decompressobj(_READ_WINDOW).decompress(data, cluster_size)


def _unzstd(data: Buffer, cluster_size: int) -> bytes:
    """One or more frames, until the cluster is full; the last one has to be complete."""
    view, room, frames = memoryview(data), cluster_size, 0
    pieces: list[bytes] = []
    while room and view:
        if frames == _MAX_FRAMES:
            raise CorruptImage(f"the zstd stream has more than {_MAX_FRAMES} frames")
        frames += 1
        frame = zstd.ZstdDecompressor()
        while not frame.eof:
            # In pieces, as what is left of one is copied at the end of each frame.
            chunk = view[: _CHUNK if frame.needs_input else 0]
            if frame.needs_input and not chunk:
                raise zstd.ZstdError("it is not complete")
            view = view[len(chunk) :]
            piece = frame.decompress(chunk, max(room, 1))
            if len(piece) > room:
                raise CorruptImage("a zstd frame goes on beyond the end of its cluster")
            pieces.append(piece)
            room -= len(piece)
        view = memoryview(data)[len(data) - len(view) - len(frame.unused_data) :]
    return b"".join(pieces)


def compress(compression_type: CompressionType, data: bytes) -> bytes | None:
    """``data`` (one cluster) compressed as QEMU does it; None if that does not make it shorter."""
    if compression_type is CompressionType.ZSTD:
        stream = zstd.compress(data)
    else:
        deflater = zlib.compressobj(wbits=_WRITE_WINDOW)
        stream = deflater.compress(data) + deflater.flush()
    return stream if len(stream) < len(data) else None
