"""Compressed clusters (pure).

docs/interop/qcow2.rst, compression_type and "Compressed Clusters Descriptor". The data reaches to
the end of a sector, so what follows the stream is no error: "decompression stops when it has
produced a cluster of data". No more than that is ever produced.

The work is done outside the GIL, and each time that a thread wants it back may cost as much as a
tenth of a cluster: what known writers make, streams of exactly one cluster, goes through calls that
give it up once. What these refuse is looked at again with care.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
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
    from isal import isal_zlib as inflater  # two and a half times as fast
except ImportError:
    inflater = zlib

# QEMU has a window of 4 KiB both ways; the specification has no limit.
_WRITE_WINDOW = -12
_READ_WINDOW = -15
# Known writers make one; a cluster full of empty frames would take seconds.
_MAX_FRAMES = 1024


# Beyond this part of a cluster it is faster to decompress all of it with one call.
_MOST_INFLATED = 0.75
# The beginning of a stream holds the code of its first block, and the parts are not equally dense.
_PART_MORE = 512

# Contexts are as expensive as a part of a cluster. There are as many as threads that decompress.
_zstd_contexts: list[zstandard.ZstdDecompressor] = []


def decompress_all(
    compression_type: CompressionType,
    streams: Sequence[tuple[memoryview, int]],
    cluster_size: int,
) -> list[Buffer | CorruptImage]:
    """For each (stream, length): the first ``length`` bytes at least of the cluster of
    ``cluster_size`` bytes that it holds, or what is wrong with them.
    """
    if compression_type is CompressionType.ZSTD:
        with suppress(zstandard.ZstdError, zstd.ZstdError):
            return [*_unzstd_whole([stream for stream, _ in streams], cluster_size)]
    return [_outcome(compression_type, *stream, cluster_size) for stream in streams]


def _unzstd_whole(streams: Sequence[memoryview], cluster_size: int) -> list[bytes]:
    """Of streams that are one frame each, which tells that it holds a cluster."""
    if any(zstandard.frame_content_size(stream) != cluster_size for stream in streams):
        raise zstandard.ZstdError
    frames: list[Buffer] = [stream[: zstd.get_frame_size(stream)] for stream in streams]
    try:
        context = _zstd_contexts.pop()
    except IndexError:  # others have them all; to look first would be too early
        context = zstandard.ZstdDecompressor()
    clusters = [context.decompress(frame) for frame in frames]
    _zstd_contexts.append(context)
    return clusters


def _outcome(
    compression_type: CompressionType, stream: memoryview, length: int, cluster_size: int
) -> Buffer | CorruptImage:
    try:
        if compression_type is CompressionType.ZLIB and length <= cluster_size * _MOST_INFLATED:
            beginning = _inflate_beginning(stream, length, cluster_size)
            if len(beginning) >= length:
                return beginning
        return decompress(compression_type, stream, cluster_size)
    except CorruptImage as error:
        return error


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


def _inflate_beginning(stream: memoryview, length: int, cluster_size: int) -> bytes:
    """About ``length`` bytes, from as much of the stream; fewer if that is not enough, or damaged
    (`decompress` tells what is wrong).
    """
    part = len(stream) * length // cluster_size
    with suppress(inflater.error):
        beginning: bytes = inflater.decompressobj(_READ_WINDOW).decompress(
            stream[: part + part // 16 + _PART_MORE], cluster_size
        )
        return beginning
    return b""


def _inflate(data: Buffer, cluster_size: int) -> Buffer:
    with suppress(DeflateError):
        if len(whole := deflate_decompress(data, cluster_size)) == cluster_size:
            return whole
    cluster: bytes = inflater.decompressobj(_READ_WINDOW).decompress(data, cluster_size)
    return cluster


def _unzstd(data: Buffer, cluster_size: int) -> bytes:
    """One or more frames, until the cluster is full; the last one has to be complete."""
    view, room = memoryview(data), cluster_size
    pieces: list[bytes] = []
    while room and view:
        if len(pieces) == _MAX_FRAMES:
            raise CorruptImage(f"the zstd stream has more than {_MAX_FRAMES} frames")
        # To look for the frame's end first demands that it is complete, and spares copies of the
        # rest: a cluster may hold very many frames.
        size = zstd.get_frame_size(view)
        frame = zstd.ZstdDecompressor()
        piece = frame.decompress(view[:size], room)
        if not frame.eof and frame.decompress(b"", 1):
            raise CorruptImage("a zstd frame goes on beyond the end of its cluster")
        pieces.append(piece)
        room -= len(piece)
        view = view[size:]
    return b"".join(pieces)


def compress(compression_type: CompressionType, data: bytes) -> bytes | None:
    """``data`` (one cluster) compressed as QEMU does it; None if that does not make it shorter."""
    if compression_type is CompressionType.ZSTD:
        stream = zstd.compress(data)
    else:
        deflater = zlib.compressobj(wbits=_WRITE_WINDOW)
        stream = deflater.compress(data) + deflater.flush()
    return stream if len(stream) < len(data) else None
