"""The structures of a qcow2 file, as docs/interop/qcow2.rst of QEMU lays them out (pure).

Structures that are read once for an image are declared with construct. L1 and L2 entries, which are
read by the million, are masks here and arithmetic in `entries`. All numbers on disk are big endian;
all offsets and lengths are bytes. The limits are those of QEMU where the specification names none:
an image beyond them was never written by a real tool, and memory is not given away on a header's
word.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, IntFlag

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Struct

MAGIC = b"QFI\xfb"

# --- Header -----------------------------------------------------------------------------------

HEADER_V2 = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
# What version 3 adds directly behind.
HEADER_V3_FIELDS = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
# Where the fields are that are rewritten while an image is open; all in the first sector.
REFCOUNT_TABLE_FIELDS = Struct(
    "refcount_table_offset" / Int64ub, "refcount_table_clusters" / Int32ub
)
REFCOUNT_TABLE_FIELDS_OFFSET = 48
INCOMPATIBLE_OFFSET = 72
AUTOCLEAR_OFFSET = 88
HEADER_LENGTH_V2 = HEADER_V2.sizeof()  # 72
# 104. Behind it are additional fields: so far the compression type, a byte, padded to 8 bytes.
HEADER_LENGTH_V3 = HEADER_LENGTH_V2 + HEADER_V3_FIELDS.sizeof()

REFCOUNT_ORDER_V2 = 4  # version 2 always has refcounts of 1 << 4 = 16 bits


class CryptMethod(IntEnum):
    """The header's crypt_method."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """The header's compression_type; `str()` gives the name that qemu-img prints."""

    ZLIB = 0  # "deflate" in the specification: raw deflate, without a zlib header
    ZSTD = 1

    def __str__(self) -> str:
        return self.name.lower()


class Incompatible(IntFlag):
    """incompatible_features: an image with a bit that is unknown must not be opened."""

    NONE = 0
    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4

    def __str__(self) -> str:
        return feature_names(FeatureType.INCOMPATIBLE, self)


class Compatible(IntFlag):
    """compatible_features: unknown bits may be ignored."""

    NONE = 0
    LAZY_REFCOUNTS = 1 << 0

    def __str__(self) -> str:
        return feature_names(FeatureType.COMPATIBLE, self)


class Autoclear(IntFlag):
    """autoclear_features: unknown bits must be cleared before the image is written to."""

    NONE = 0
    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1

    def __str__(self) -> str:
        return feature_names(FeatureType.AUTOCLEAR, self)


class FeatureType(IntEnum):
    """Which of the three bitmasks a feature name table entry speaks of."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


# The names that QEMU writes into its feature name tables, by (type, bit).
FEATURE_NAMES: Mapping[tuple[int, int], str] = {
    (FeatureType.INCOMPATIBLE, 0): "dirty bit",
    (FeatureType.INCOMPATIBLE, 1): "corrupt bit",
    (FeatureType.INCOMPATIBLE, 2): "external data file",
    (FeatureType.INCOMPATIBLE, 3): "compression type",
    (FeatureType.INCOMPATIBLE, 4): "extended L2 entries",
    (FeatureType.COMPATIBLE, 0): "lazy refcounts",
    (FeatureType.AUTOCLEAR, 0): "bitmaps",
    (FeatureType.AUTOCLEAR, 1): "raw external data",
}


def feature_names(
    feature_type: FeatureType, mask: int, table: Mapping[tuple[int, int], str] = FEATURE_NAMES
) -> str:
    """The features set in ``mask``: their names in ``table``, or their numbers where it has none.

    Names are printable, whatever an image's table says.
    """
    bits = (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
    names = ", ".join(table.get((feature_type, bit)) or f"bit {bit}" for bit in bits)
    return "".join(sign if sign.isprintable() else "?" for sign in names)


# --- Header extensions --------------------------------------------------------------------------

EXTENSION = Struct("type" / Int32ub, "length" / Int32ub)  # then the data, padded to 8 bytes


class ExtensionType(IntEnum):
    """Header extension types."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAME_TABLE = 0x6803F857
    BITMAPS = 0x23852875
    FULL_DISK_ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


FEATURE_NAME = Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))

BITMAPS_EXTENSION = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)

# --- Bitmap directory ---------------------------------------------------------------------------

# Followed by the extra data and the name, padded to 8 bytes.
BITMAP_DIRECTORY_ENTRY = Struct(
    "bitmap_table_offset" / Int64ub,
    "bitmap_table_size" / Int32ub,  # in entries of 8 bytes
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
BITMAP_FLAGS_OFFSET = 12  # of the flags in an entry
BITMAP_TYPE_DIRTY_TRACKING = 1


class BitmapFlags(IntFlag):
    """Flags of a bitmap directory entry."""

    NONE = 0
    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


# --- Snapshot table -----------------------------------------------------------------------------

# Followed by the extra data, the ID and the name, padded to 8 bytes.
SNAPSHOT_ENTRY = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)
# The extra data that is defined. Each field is there if extra_data_size reaches its end.
SNAPSHOT_EXTRA = Struct("vm_state_size" / Int64ub, "disk_size" / Int64ub, "icount" / Int64ub)

# --- L1 and L2 entries, refcount table, bitmap table --------------------------------------------

L1E_SIZE = 8
COPIED = 1 << 63  # the refcount is exactly one; accurate in what the active L1 table reaches
COMPRESSED = 1 << 62
ZERO = 1 << 0
L1E_OFFSET_MASK = 0x00FFFFFFFFFFFE00  # bits 9-55
L1E_RESERVED_MASK = 0x7F000000000001FF  # bits 0-8 and 56-62
L2E_OFFSET_MASK = 0x00FFFFFFFFFFFE00  # bits 9-55
L2E_RESERVED_MASK = 0x3F000000000001FE  # bits 1-8, 56-61; bit 0 too in version 2 and extended L2
L2E_DESCRIPTOR_MASK = COMPRESSED - 1  # bits 0-61
REFT_OFFSET_MASK = 0xFFFFFFFFFFFFFE00  # bits 9-63
REFT_RESERVED_MASK = 0x1FF
BITMAP_TABLE_OFFSET_MASK = 0x00FFFFFFFFFFFE00  # bits 9-55
BITMAP_TABLE_RESERVED_MASK = 0xFF000000000001FE  # bits 1-8 and 56-63
BITMAP_TABLE_ALL_ONES = 1  # bit 0, of an entry without an offset

SUBCLUSTERS = 32  # of each cluster with extended L2 entries
SECTOR = 512  # the unit of a compressed cluster's length, of extended L2's smallest subcluster

# --- Limits -------------------------------------------------------------------------------------

MIN_CLUSTER_BITS = 9  # 512 bytes: the specification
MAX_CLUSTER_BITS = 21  # 2 MiB: QEMU
MIN_CLUSTER_BITS_EXTENDED = 14  # 32 subclusters of 512 bytes = 16 KiB
MAX_REFCOUNT_ORDER = 6  # 64 bits
MAX_OFFSET = (1 << 63) - 1  # a file offset is a signed 64-bit number

MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15  # QEMU keeps it in 16 bytes with the final zero

# 2^22 entries. With 2 MiB clusters 2^22 x 2^18 x 2^21 = 2^61 bytes (2 EiB), with 512-byte clusters
# 2^22 x 2^6 x 2^9 = 2^37 (128 GiB).
MAX_L1_BYTES = 32 << 20
# 2^20 blocks. With 2 MiB clusters and 16-bit refcounts 2^20 x 2^20 x 2^21 = 2^61 bytes.
MAX_REFCOUNT_TABLE_BYTES = 8 << 20

MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_EXTRA = 1024
# Bounds the memory of a full table: 65536 x (40 + 1024 + ID + name) bytes are 66 MiB and more.
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_L1_BYTES = MAX_L1_BYTES

MAX_BITMAPS = 65535
# 64 MiB - 1 KiB: 24 bytes and a name of 1000 for each.
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_BITMAP_BYTES = 512 << 20  # of bitmap data: 2^32 bits, 256 TiB with 64 KiB granularity
MIN_BITMAP_GRANULARITY_BITS = 9
MAX_BITMAP_GRANULARITY_BITS = 31
MAX_BITMAP_NAME = 1023
