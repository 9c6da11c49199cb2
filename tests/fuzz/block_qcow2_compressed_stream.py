"""The stream of a compressed cluster, deflate or zstd, in clusters of several sizes
(docs/interop/qcow2.rst, compression_type; RFC 1951, RFC 8878).

Nothing is allowed but `CorruptImage`. There is never more than a cluster of output; what the quick
calls say is what the careful one says, and, where it does not refuse the stream, another library:
libdeflate takes codes of lengths that RFC 1951 has not, and is trusted then.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO

import zstandard

from pynbd.block.qcow2.compression import compress, cost, decompress, decompress_all
from pynbd.block.qcow2.format import CompressionType
from pynbd.errors import CorruptImage
from tests.fuzz.taking import Taking

ALLOWED = (CorruptImage,)
MAX_LEN = 8192
DICTIONARY = (
    *(b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", b"\0\0\0\xff\xff", b"\1\0\0\xff\xff", b"\3\0"),
    *(b"\0\0\0", b"\1\0\0", b"\x20\0\1\0\0", b"\0\x88\1\0\0", b"\0\xf8", b"\x02\x10\0a"),
)
_SIZES = (512, 4096, 1 << 16, 1 << 21)
ZLIB, ZSTD = CompressionType.ZLIB, CompressionType.ZSTD


def seeds() -> Iterable[bytes]:
    rng = random.Random(1)
    for index, size in enumerate(_SIZES[:3]):
        for text in (b"a" * size, bytes(rng.choices(b"abcd", k=min(size, 9000))).ljust(size)):
            for kind in CompressionType:
                stream = compress(kind, text)
                assert stream is not None
                for more in (b"", b"garbage", stream):
                    yield bytes([kind, index, 3]) + stream + more
        half = compress(ZSTD, bytes(size // 2)) or b""
        yield bytes([ZSTD, index, 0]) + half + b"\x50\x2a\x4d\x18\2\0\0\0xx" + half
        yield bytes([ZSTD, index, 0]) + b"\x28\xb5\x2f\xfd\x20\0\1\0\0" * 100 + half * 2
        yield bytes([ZSTD, index, 0]) + b"\x28\xb5\x2f\xfd\0\x88" + b"\0\0\0" * 300 + b"\1\0\0"
        yield bytes([ZLIB, index, 0]) + b"\0\0\0\xff\xff" * 100 + (compress(ZLIB, text) or b"")
        yield bytes([ZLIB, index, 0]) + zlib.compress(bytes(4 * size))[2:]
    yield bytes([ZSTD, 2, 0]) + (compress(ZSTD, bytes(8 << 20)) or b"")


def one_input(data: bytes) -> None:
    taking = Taking(data)
    kind = CompressionType(taking.number(1) & 1)
    size = _SIZES[taking.below(4)]
    length = max(size * taking.number(1) // 255, 1)
    stream = taking.rest()[: 2 * size]
    assert 0 <= cost(kind, len(stream), length, size) <= 2 * len(stream)
    (quick,) = decompress_all(kind, [(memoryview(stream), length)], size)
    try:
        careful = decompress(kind, stream, size)
    except CorruptImage:
        # The beginning may be well, where what comes later is not.
        assert quick is None or len(quick) < size
        raise
    assert len(careful) == size
    if quick is not None:
        assert length <= len(quick) <= size
        assert quick == careful[: len(quick)]
    with suppress(zlib.error):
        assert careful == _independently(kind, stream, size)


def _independently(kind: CompressionType, stream: bytes, size: int) -> bytes:
    if kind is ZLIB:
        return zlib.decompressobj(-15).decompress(stream, size)
    reader = zstandard.ZstdDecompressor().stream_reader(BytesIO(stream), read_across_frames=True)
    return reader.read(size)
