"""Headers: golden bytes from the specification, damage of every field, and images by qemu-img."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interop import peers
from pynbd.block.qcow2.format import (
    Autoclear,
    Compatible,
    CompressionType,
    ExtensionType,
    Incompatible,
)
from pynbd.block.qcow2.header import (
    BitmapsExtension,
    Extension,
    Header,
    encode,
    is_qcow2,
    parse,
)
from pynbd.errors import CorruptImage, ImageError, UnsupportedFeature, UsageError

# Fields in the order of the specification; 64 KiB clusters, 1 GiB, so that two L1 entries suffice.
V2 = struct.pack(
    ">4sIQIIQIIQQIIQ",
    *(b"QFI\xfb", 2, 0, 0, 16, 1 << 30, 0, 2, 0x30000, 0x10000, 1, 0, 0),
)
V3 = struct.pack(
    ">4sIQIIQIIQQIIQ QQQII",
    *(b"QFI\xfb", 3, 0, 0, 16, 1 << 30, 0, 2, 0x30000, 0x10000, 1, 0, 0),
    *(0, 0, 0, 4, 104),
)
END = bytes(8)


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def read(data: bytes, *pokes: tuple[int, bytes]) -> Header:
    cluster = bytearray(data.ljust(65536, b"\0"))
    for offset, piece in pokes:
        cluster[offset : offset + len(piece)] = piece
    return parse(bytes(cluster), name="x.qcow2", file_size=1 << 20)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def test_version_2() -> None:
    header = read(V2)
    assert (header.version, header.header_length, header.refcount_bits) == (2, 72, 16)
    assert (header.size, header.l1_size, header.l1_table_offset) == (1 << 30, 2, 0x30000)
    assert (header.refcount_table_offset, header.refcount_table_clusters) == (0x10000, 1)
    assert not header.incompatible
    assert not header.compatible
    assert not header.autoclear


def test_version_2_has_no_feature_fields() -> None:
    # Bytes 72 on are extensions: an unknown one, whose type would look like feature bits.
    header = read(V2 + extension(0xFFFFFFFF, b"abc") + END)
    assert header.extensions == (Extension(0xFFFFFFFF, b"abc"),)
    assert not header.incompatible


def test_version_3_with_everything() -> None:
    name = b"../base image.raw"
    area = (
        extension(0xE2792ACA, b"raw")
        + extension(0x44415441, b"data.raw")
        + extension(0x6803F857, b"\x00\x07" + b"bit seven".ljust(46, b"\0"))
        + extension(0x23852875, struct.pack(">IIQQ", 2, 0, 64, 0x50000))
        + extension(0x12345678, b"unknown")
        + END
    )
    fields = bytearray(V3 + b"\x01" + bytes(7) + area + name)
    fields[8:20] = struct.pack(">QI", 112 + len(area), len(name))
    fields[36:40] = u32(4)  # an extended L2 table maps half as much
    fields[60:72] = struct.pack(">IQ", 3, 0x60000)
    fields[72:104] = struct.pack(">QQQII", 0b11111, 1, 1, 6, 112)
    header = read(bytes(fields))
    assert header.backing_file == "../base image.raw"
    assert (header.backing_format, header.data_file) == ("raw", "data.raw")
    assert header.feature_names == {(0, 7): "bit seven"}
    assert header.bitmaps == BitmapsExtension(2, 64, 0x50000)
    assert header.extensions == (Extension(0x12345678, b"unknown"),)
    assert (header.nb_snapshots, header.snapshots_offset) == (3, 0x60000)
    assert header.incompatible == Incompatible(31)
    assert header.compatible is Compatible.LAZY_REFCOUNTS
    assert header.compression_type is CompressionType.ZSTD
    assert (header.refcount_bits, header.l2_entry_size, header.subcluster_size) == (64, 16, 2048)
    assert header.layout.l2_bits == 12
    assert header.has_data_file
    assert not header.raw_data_file


def test_the_virtual_size_is_whole_sectors() -> None:
    header = read(V3, (24, u64(1_000_000)))
    assert (header.size, header.virtual_size) == (1_000_000, 999_936)


def test_unknown_compatible_and_autoclear_bits_do_no_harm() -> None:
    header = read(V3, (80, u64(1 << 63)), (88, u64(1 << 62)))
    assert header.compatible == 1 << 63
    assert header.autoclear == 1 << 62


def test_the_corrupt_and_dirty_bits_do_not_stop_reading() -> None:
    assert read(V3, (72, u64(3))).incompatible == Incompatible.DIRTY | Incompatible.CORRUPT


def test_names_that_are_not_utf_8_survive() -> None:
    header = read(V3 + END + b"b\xffse", (8, struct.pack(">QI", 112, 4)))
    assert header.backing_file == "b\udcffse"
    assert encode(header)[112:116] == b"b\xffse"


def test_a_bitmaps_extension_that_is_not_marked_consistent_may_hold_anything() -> None:
    good, bad = struct.pack(">IIQQ", 1, 0, 32, 0x50000), struct.pack(">IIQQ", 0, 9, 1, 7)
    assert read(V3 + extension(0x23852875, good)).bitmaps == BitmapsExtension(1, 32, 0x50000)
    header = read(V3 + extension(0x23852875, bad))
    assert (header.bitmaps, header.extensions) == (None, (Extension(0x23852875, bad),))


def bitmaps(fields: str, *values: int) -> bytes:
    return V3 + extension(0x23852875, struct.pack(fields, *values))


@pytest.mark.parametrize(
    "data, pokes, error, words",
    [
        (V3, [(0, b"QFI\xfa")], CorruptImage, "not a qcow2 image"),
        (V3, [(4, u32(1))], UnsupportedFeature, "version 1"),
        (V3, [(4, u32(4))], UnsupportedFeature, "version 4"),
        (V3, [(8, struct.pack(">QI", 65537, 0))], CorruptImage, "backing_file_offset is 0x10001"),
        (V3, [(8, u64(1 << 63))], CorruptImage, "backing_file_offset"),
        (
            V3,
            [(8, struct.pack(">QI", 1024, 1024))],
            CorruptImage,
            "backing_file_size is 1024; 1023",
        ),
        (V3, [(8, struct.pack(">QI", 65530, 7))], CorruptImage, "backing_file_size is 7; 6"),
        (V3, [(20, u32(8))], CorruptImage, "cluster_bits is 8; 9 to 21"),
        (V3, [(20, u32(22))], CorruptImage, "cluster_bits is 22; 9 to 21"),
        (V3, [(20, u32(0xFFFFFFFF))], CorruptImage, "cluster_bits is 4294967295"),
        # A 64 KiB L2 table maps 8192 x 64 KiB = 512 MiB.
        (V3, [(24, u64((1 << 30) + 1))], CorruptImage, "l1_size is 2; .* needs 3"),
        (V3, [(24, u64(1 << 63))], CorruptImage, "l1_size is 2; .* needs 17179869184"),
        (V3, [(32, u32(1))], UnsupportedFeature, "encrypted .AES"),
        (V3, [(32, u32(2))], UnsupportedFeature, "encrypted .LUKS"),
        (V3, [(32, u32(3))], UnsupportedFeature, "encrypted .method 3"),
        (V3, [(36, u32((32 << 20) // 8 + 1))], CorruptImage, "l1_size is 4194305; 4194304"),
        (V3, [(40, u64(0x30001))], CorruptImage, "l1_table_offset is 0x30001"),
        (V3, [(40, u64((1 << 63) - 65536)), (36, u32(8193))], CorruptImage, "l1_table_offset"),
        (V3, [(48, u64(0x10200))], CorruptImage, "refcount_table_offset is 0x10200"),
        (V3, [(48, u64(1 << 63))], CorruptImage, "refcount_table_offset is 0x8000000000000000"),
        (V3, [(56, u32(0))], CorruptImage, "refcount_table_clusters is 0; 1 to 128"),
        (V3, [(56, u32(129))], CorruptImage, "refcount_table_clusters is 129; 1 to 128"),
        (V3, [(60, u32(65537))], CorruptImage, "nb_snapshots is 65537; 65536"),
        (V3, [(64, u64(8))], CorruptImage, "snapshots_offset is 0x8"),
        (V3, [(72, u64(1 << 5))], UnsupportedFeature, "unknown incompatible features: bit 5"),
        (V3, [(72, u64(1 << 3))], CorruptImage, "compression_type is 0"),
        (V3, [(72, u64(1 << 4)), (20, u32(13)), (36, u32(4096))], CorruptImage, "13; .* 14"),
        (V3, [(96, u32(7))], CorruptImage, "refcount_order is 7; 6"),
        (V3, [(100, u32(96))], CorruptImage, "header_length is 96"),
        (V3, [(100, u32(108))], CorruptImage, "header_length is 108"),
        (V3, [(100, u32(65544))], CorruptImage, "header_length is 65544"),
        (V3, [(100, u32(112)), (104, b"\1")], CorruptImage, "compression_type is 1"),
        (
            V3,
            [(100, u32(112)), (104, b"\2"), (72, u64(1 << 3))],
            UnsupportedFeature,
            "compression_type is 2",
        ),
        (V3, [(104, struct.pack(">II", 5, 65536 - 111))], CorruptImage, "0x00000005 at 0x68"),
        (V3, [(104, struct.pack(">II", 5, 0xFFFFFFFF))], CorruptImage, "0x00000005 at 0x68"),
        (
            V3 + extension(5, bytes(24)),
            [(8, struct.pack(">QI", 128, 1))],
            CorruptImage,
            "24 bytes long; there is room for 16",
        ),
        (V3 + 2 * extension(0xE2792ACA, b"raw"), [], CorruptImage, "more than once"),
        (V3 + extension(0xE2792ACA, b"x" * 16), [], CorruptImage, "backing format"),
        (V3 + extension(0x0537BE77, bytes(16)), [], CorruptImage, "crypt_method is 0"),
        (V3, [(88, u64(1))], CorruptImage, "bitmaps extension is missing"),
        (V3, [(88, u64(2))], CorruptImage, "no external data file"),
        (
            V3 + END + b"base",
            [(72, u64(4)), (88, u64(2)), (8, struct.pack(">QI", 112, 4))],
            CorruptImage,
            "backing file",
        ),
        (bitmaps(">IIQ", 1, 0, 32), [(88, u64(1))], CorruptImage, "16 bytes long, not 24"),
        (bitmaps(">IIQQ", 0, 0, 32, 0), [(88, u64(1))], CorruptImage, "nb_bitmaps is 0"),
        (bitmaps(">IIQQ", 65536, 0, 32, 0), [(88, u64(1))], CorruptImage, "1 to 65535"),
        (bitmaps(">IIQQ", 1, 1, 32, 0), [(88, u64(1))], CorruptImage, "reserved"),
        (bitmaps(">IIQQ", 1, 0, 1 << 40, 0), [(88, u64(1))], CorruptImage, "directory_size"),
        (
            bitmaps(">IIQQ", 1, 0, 32, 512),
            [(88, u64(1))],
            CorruptImage,
            "directory_offset is 0x200",
        ),
    ],
)
def test_what_is_refused(
    data: bytes, pokes: list[tuple[int, bytes]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^x.qcow2: .*{words}") as caught:
        read(data, *pokes)
    assert "\n" not in str(caught.value)


def test_an_unknown_feature_is_called_by_its_name() -> None:
    table = b"\x00\x05" + b"time travel".ljust(46, b"\0") + b"\x01\x06" + b"other".ljust(46, b"\0")
    with pytest.raises(UnsupportedFeature, match=r"features: time travel, bit 6$"):
        read(V3 + extension(0x6803F857, table), (72, u64(0b1100000)))


@pytest.mark.parametrize("length", range(4, 112))
def test_a_file_that_ends_within_its_header(length: int) -> None:
    with pytest.raises(CorruptImage, match=f"x: the file ends .* {length} bytes"):
        parse((V3 + END)[:length], name="x", file_size=length)


def test_is_qcow2() -> None:
    assert is_qcow2(V2)
    assert not is_qcow2(b"QFI")
    assert not is_qcow2(b"")


@given(st.binary(min_size=0, max_size=200))
def test_garbage_behind_the_magic_is_refused_or_read(garbage: bytes) -> None:
    data = (V3[:20] + u32(9) + garbage).ljust(512, b"\0")
    try:
        header = parse(data, name="x", file_size=512)
    except ImageError:
        return
    assert header.l1_size * 8 <= 32 << 20


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=64",
        "refcount_bits=1",
        "lazy_refcounts=on",
        "compression_type=zstd",
        "extended_l2=on,cluster_size=16k",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
        "backing_file=base.raw,backing_fmt=raw",
        "compat=0.10,backing_file=base.raw,backing_fmt=raw",
    ],
)
def test_images_by_qemu_img(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.require("qemu-img")
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(1 << 20))
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "3M")
    data = Path("x.qcow2").read_bytes()
    header = parse(data, name="x.qcow2", file_size=len(data))
    info = json.loads(peers.run("qemu-img", "info", "--output=json", "x.qcow2").stdout)
    specific = info["format-specific"]["data"]
    assert header.version == {"0.10": 2, "1.1": 3}[specific["compat"]]
    assert header.virtual_size == info["virtual-size"] == 3 << 20
    assert header.cluster_size == info["cluster-size"]
    assert header.refcount_bits == specific["refcount-bits"]
    assert str(header.compression_type) == specific["compression-type"]
    assert header.backing_file == info.get("backing-filename")
    assert header.backing_format == info.get("backing-filename-format")
    assert header.data_file == specific.get("data-file")
    assert header.raw_data_file == specific.get("data-file-raw", False)
    assert header.extended_l2 == specific.get("extended-l2", False)
    lazy = Compatible.LAZY_REFCOUNTS in header.compatible
    assert lazy == specific.get("lazy-refcounts", False)
    # What qemu-img wrote, byte for byte.
    assert encode(header) == data[: header.cluster_size]


def test_what_is_not_known_is_written_again() -> None:
    data = bytearray(V3 + b"\0\0\0\0\0\0\0\x07later fields 16.")
    data[100:104] = u32(len(data))
    data += extension(0x12345678, b"unknown") + END
    cluster = bytes(data).ljust(65536, b"\0")
    assert encode(read(cluster)) == cluster


def test_a_changed_header_is_read_as_it_was_meant() -> None:
    header = replace(
        read(V3),
        backing_file="a/b.qcow2",
        backing_format="qcow2",
        bitmaps=BitmapsExtension(1, 32, 0x50000),
        autoclear=Autoclear.BITMAPS,
        incompatible=Incompatible.COMPRESSION_TYPE,
        compression_type=CompressionType.ZSTD,
        feature_names={(0, 3): "compression type"},
    )
    again = read(encode(header))
    expected = replace(header, header_length=112, additional_fields=bytes(7))
    assert again == expected
    assert ExtensionType.BITMAPS not in {kept.type for kept in again.extensions}


def test_a_header_that_does_not_fit_is_an_error() -> None:
    header = replace(read(V3), cluster_bits=9, backing_file="x" * 401)
    with pytest.raises(UsageError, match="513 bytes, but a cluster has 512"):
        encode(header)
