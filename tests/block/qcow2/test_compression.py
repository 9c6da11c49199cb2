"""Compressed clusters: streams by qemu-img, by zlib and by zstd, whole and damaged."""

import os
import random
import sys
import zlib
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.extent import COMPRESSED
from pynbd.block.qcow2 import header
from pynbd.block.qcow2.compression import compress, decompress
from pynbd.block.qcow2.entries import compressed_range, decode
from pynbd.block.qcow2.format import CompressionType
from pynbd.errors import CorruptImage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

import numpy as np

ZLIB, ZSTD = CompressionType.ZLIB, CompressionType.ZSTD
K64 = 1 << 16


def text(length: int, seed: int = 1) -> bytes:
    """Compressible bytes without a short period."""
    words = random.Random(seed).choices([b"some ", b"words ", b"or "], k=length // 3 + 1)
    return b"".join(words)[:length]


def deflate(data: bytes, window: int = 12) -> bytes:
    deflater = zlib.compressobj(9, wbits=-window)
    return deflater.compress(data) + deflater.flush()


class TestDeflate:
    def test_one_cluster(self) -> None:
        assert decompress(ZLIB, deflate(text(K64)), K64) == text(K64)

    def test_a_window_beyond_qemus(self) -> None:
        # A match 30,000 bytes back, as other writers may make it.
        data = os.urandom(30_000)
        data = (data + data).ljust(K64, b"\0")
        stream = deflate(data, window=15)
        assert len(stream) < 40_000
        assert decompress(ZLIB, stream, K64) == data

    def test_garbage_behind_the_stream(self) -> None:
        assert decompress(ZLIB, deflate(text(K64)) + os.urandom(511), K64) == text(K64)

    def test_stored_and_empty_blocks(self) -> None:
        deflater = zlib.compressobj(0, wbits=-12)
        stream = deflater.flush(zlib.Z_FULL_FLUSH) + deflater.compress(text(512)) + deflater.flush()
        assert decompress(ZLIB, stream, 512) == text(512)

    def test_decompression_stops_when_it_has_produced_a_cluster(self) -> None:
        assert decompress(ZLIB, deflate(bytes(64 << 20)), K64) == bytes(K64)
        assert decompress(ZLIB, deflate(text(K64 + 1)), K64) == text(K64)

    @pytest.mark.parametrize("cluster_size", [512, 4096, 2 << 20])
    def test_cluster_sizes(self, cluster_size: int) -> None:
        assert decompress(ZLIB, deflate(text(cluster_size)), cluster_size) == text(cluster_size)

    @pytest.mark.parametrize(
        "stream, words",
        [
            (b"", "ends after 0 of"),
            (deflate(text(K64 - 1)), "ends after 65535 of 65536"),
            (deflate(text(K64))[:-200], "ends after"),
            (b"\xff" * 100, "damaged"),
            (zlib.compress(text(K64)), "damaged"),  # with a zlib header
        ],
    )
    def test_damage(self, stream: bytes, words: str) -> None:
        with pytest.raises(CorruptImage, match=f"zlib stream.*{words}"):
            decompress(ZLIB, stream, K64)


class TestZstd:
    def test_one_frame_and_garbage(self) -> None:
        stream = zstd.compress(text(K64)) + b"\0" * 100
        assert decompress(ZSTD, stream, K64) == text(K64)

    def test_frames_until_the_cluster_is_full(self) -> None:
        data = text(K64)
        pieces = [data[:1], b"", data[1:40_000], data[40_000:]]
        stream = b"".join(zstd.compress(piece) for piece in pieces) + b"garbage"
        assert decompress(ZSTD, stream, K64) == data

    def test_a_frame_with_a_checksum_and_without_its_size(self) -> None:
        options = {
            zstd.CompressionParameter.checksum_flag: 1,
            zstd.CompressionParameter.content_size_flag: 0,
        }
        stream = zstd.compress(text(K64), options=options)
        assert decompress(ZSTD, stream, K64) == text(K64)

    def test_the_last_frame_has_to_be_complete(self) -> None:
        stream = zstd.compress(text(K64))
        for cut in (1, 2, 100):
            with pytest.raises(CorruptImage, match="zstd stream is damaged"):
                decompress(ZSTD, stream[:-cut], K64)

    @pytest.mark.parametrize("length", [K64 + 1, 64 << 20])
    def test_a_frame_beyond_the_cluster(self, length: int) -> None:
        with pytest.raises(CorruptImage, match="beyond the end of its cluster"):
            decompress(ZSTD, zstd.compress(bytes(length)), K64)

    @pytest.mark.parametrize(
        "stream, words",
        [
            (b"", "ends after 0 of"),
            (zstd.compress(text(100)), "ends after 100 of"),
            (zstd.compress(text(100)) + b"\0" * 50, "damaged"),
            (b"\xff" * 100, "damaged"),
        ],
    )
    def test_damage(self, stream: bytes, words: str) -> None:
        with pytest.raises(CorruptImage, match=f"zstd stream.*{words}"):
            decompress(ZSTD, stream, K64)

    def test_very_many_empty_frames(self) -> None:
        # 4 MiB is the longest compressed cluster that an L2 entry can describe.
        stream = zstd.compress(b"") * ((4 << 20) // len(zstd.compress(b"")))
        with pytest.raises(CorruptImage, match="more than 1024 frames"):
            decompress(ZSTD, stream, 2 << 20)


@pytest.mark.parametrize("compression_type", list(CompressionType))
def test_what_we_write(compression_type: CompressionType) -> None:
    stream = compress(compression_type, text(K64))
    assert stream is not None
    assert len(stream) < K64
    assert decompress(compression_type, stream, K64) == text(K64)
    assert compress(compression_type, os.urandom(K64)) is None


@pytest.mark.parametrize("compression_type", list(CompressionType))
@pytest.mark.parametrize("cluster_size", [512, K64, 2 << 20])
def test_clusters_by_qemu_img(
    compression_type: CompressionType, cluster_size: int, tmp_path: Path
) -> None:
    peers.require("qemu-img")
    raw, image = tmp_path / "raw", tmp_path / "x.qcow2"
    content = text(4 * cluster_size)
    raw.write_bytes(content)
    options = f"cluster_size={cluster_size},compression_type={compression_type}"
    peers.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    data = image.read_bytes()
    found = header.parse(data, name="x", file_size=len(data))
    l2_offset = int.from_bytes(data[found.l1_table_offset :][:8]) & (1 << 56) - 1
    table = np.frombuffer(data, ">u8", cluster_size // 8, l2_offset).astype(np.uint64)
    runs = decode(table, 0, 4, found.layout, 0)
    assert runs.kind.tolist() == [COMPRESSED] * 4
    for start, end, _, descriptor, _ in runs:
        offset, length = compressed_range(descriptor, found.cluster_bits)
        cluster = decompress(compression_type, data[offset : offset + length], cluster_size)
        assert cluster == content[start:end]
