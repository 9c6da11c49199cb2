"""The structures against the byte positions of the specification, and QEMU's own feature names."""

from pathlib import Path

import pytest
from construct import Struct

from interop import peers
from pynbd.block.qcow2 import format as layout
from pynbd.block.qcow2 import header
from pynbd.block.qcow2.format import (
    Autoclear,
    Compatible,
    CompressionType,
    FeatureType,
    Incompatible,
    feature_names,
)


def field_ends(structure: Struct) -> dict[str, int]:
    """Byte position behind each field."""
    ends, at = {}, 0
    for subcon in structure.subcons:
        at += subcon.sizeof()
        ends[subcon.name] = at
    return ends


@pytest.mark.parametrize(
    "structure, ends",
    [
        # The last byte of each field in the specification, plus one.
        (
            layout.HEADER_V2,
            (
                "magic 4 version 8 backing_file_offset 16 backing_file_size 20 cluster_bits 24"
                " size 32 crypt_method 36 l1_size 40 l1_table_offset 48 refcount_table_offset 56"
                " refcount_table_clusters 60 nb_snapshots 64 snapshots_offset 72"
            ),
        ),
        (
            layout.HEADER_V3_FIELDS,  # from byte 72
            (
                "incompatible_features 8 compatible_features 16 autoclear_features 24"
                " refcount_order 28 header_length 32"
            ),
        ),
        (layout.EXTENSION, "type 4 length 8"),
        (layout.FEATURE_NAME, "type 1 bit 2 name 48"),
        (
            layout.BITMAPS_EXTENSION,
            "nb_bitmaps 4 reserved 8 bitmap_directory_size 16 bitmap_directory_offset 24",
        ),
        (
            layout.BITMAP_DIRECTORY_ENTRY,
            (
                "bitmap_table_offset 8 bitmap_table_size 12 flags 16 type 17 granularity_bits 18"
                " name_size 20 extra_data_size 24"
            ),
        ),
        (
            layout.SNAPSHOT_ENTRY,
            (
                "l1_table_offset 8 l1_size 12 id_size 14 name_size 16 date_sec 20 date_nsec 24"
                " vm_clock_nsec 32 vm_state_size 36 extra_data_size 40"
            ),
        ),
        (layout.SNAPSHOT_EXTRA, "vm_state_size 8 disk_size 16 icount 24"),  # from byte 40
    ],
)
def test_fields_are_where_the_specification_says(structure: Struct, ends: str) -> None:
    words = ends.split()
    expected = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert field_ends(structure) == expected


def test_masks_cover_the_bits_that_the_specification_names() -> None:
    def bits(first: int, last: int) -> int:
        return sum(1 << bit for bit in range(first, last + 1))

    assert layout.L1E_OFFSET_MASK == layout.L2E_OFFSET_MASK == bits(9, 55)
    assert bits(9, 55) == layout.BITMAP_TABLE_OFFSET_MASK
    assert bits(0, 8) | bits(56, 62) == layout.L1E_RESERVED_MASK
    assert bits(1, 8) | bits(56, 61) == layout.L2E_RESERVED_MASK
    assert bits(1, 8) | bits(56, 63) == layout.BITMAP_TABLE_RESERVED_MASK
    assert bits(0, 61) == layout.L2E_DESCRIPTOR_MASK
    assert bits(9, 63) == layout.REFT_OFFSET_MASK
    assert bits(0, 8) == layout.REFT_RESERVED_MASK


def test_features_print_their_names() -> None:
    assert str(Incompatible.DIRTY | Incompatible.EXTENDED_L2) == "dirty bit, extended L2 entries"
    assert str(Incompatible(1 << 40)) == "bit 40"
    assert str(Compatible.LAZY_REFCOUNTS) == "lazy refcounts"
    assert str(Autoclear.RAW_EXTERNAL_DATA) == "raw external data"
    assert str(Autoclear.NONE) == ""
    assert str(CompressionType.ZLIB) == "zlib"


def test_an_image_cannot_put_control_characters_into_a_message() -> None:
    table = {(0, 5): "new\x1b[2J\nthing", (0, 6): ""}
    assert feature_names(FeatureType.INCOMPATIBLE, 0b1100000, table) == "new?[2J?thing, bit 6"


def test_names_are_those_that_qemu_writes(tmp_path: Path) -> None:
    peers.require("qemu-img")
    image = tmp_path / "image.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    data = image.read_bytes()
    assert header.parse(data, name="", file_size=len(data)).feature_names == layout.FEATURE_NAMES
