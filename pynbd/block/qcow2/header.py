"""The header of a qcow2 file (pure).

docs/interop/qcow2.rst, "Header" to "Header padding". `parse` refuses what the specification or
QEMU's limits forbid, with one line that names the file, the field, its value and what is allowed.
What it lets through can be trusted: tables are aligned, bounded, and end below 2^63. `encode` is
the way back; it keeps what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from construct import Container, StreamError

from pynbd.block.qcow2.entries import Layout
from pynbd.block.qcow2.extensions import (
    BitmapsExtension,
    Extension,
    build_bitmaps,
    build_extension,
    build_feature_names,
    check,
    check_place,
    cut,
    read_bitmaps,
    read_extensions,
    read_feature_names,
    to_bytes,
    to_text,
)
from pynbd.block.qcow2.format import (
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    HEADER_V2,
    HEADER_V3_FIELDS,
    L1E_SIZE,
    MAGIC,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED,
    REFCOUNT_ORDER_V2,
    SECTOR,
    SNAPSHOT_ENTRY,
    SUBCLUSTERS,
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    ExtensionType,
    FeatureType,
    Incompatible,
)
from pynbd.block.qcow2.format import feature_names as format_features
from pynbd.errors import CorruptImage, UnsupportedFeature, UsageError

__all__ = ["PROBE", "BitmapsExtension", "Extension", "Header", "encode", "is_qcow2", "parse"]

PROBE = MAGIC
_KNOWN_INCOMPATIBLE = sum(Incompatible)


def is_qcow2(first_bytes: bytes) -> bool:
    """Whether a file that begins with ``first_bytes`` (4 or more) says that it is qcow2."""
    return first_bytes[:4] == PROBE


def first_cluster(first_bytes: bytes) -> int:
    """How long the first cluster is, in which the header ends, as far as ``first_bytes`` tell:
    their length for what is no header.
    """
    if len(first_bytes) < HEADER_LENGTH_V2 or not is_qcow2(first_bytes):
        return len(first_bytes)
    cluster_bits: int = HEADER_V2.parse(first_bytes).cluster_bits
    return 1 << min(cluster_bits, MAX_CLUSTER_BITS)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that obeys the rules. Names as in the specification; offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int  # as stored; see virtual_size
    l1_size: int  # entries
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    header_length: int
    backing_file: str | None = None
    backing_format: str | None = None
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = Incompatible.NONE
    compatible: Compatible = Compatible.NONE
    autoclear: Autoclear = Autoclear.NONE
    refcount_order: int = 4
    compression_type: CompressionType = CompressionType.ZLIB
    data_file: str | None = None
    bitmaps: BitmapsExtension | None = None  # to be believed only with Autoclear.BITMAPS
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    # What no field above speaks of, kept for rewriting: additional fields behind compression_type,
    # and extensions.
    additional_fields: bytes = b""
    extensions: tuple[Extension, ...] = ()

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def virtual_size(self) -> int:
        """What a guest sees: ``size`` without the part of a last sector, as QEMU shows it."""
        return self.size // SECTOR * SECTOR

    @property
    def extended_l2(self) -> bool:
        return Incompatible.EXTENDED_L2 in self.incompatible

    @property
    def has_data_file(self) -> bool:
        """Guest clusters are in another file, at the host offset that equals their guest offset."""
        return Incompatible.EXTERNAL_DATA_FILE in self.incompatible

    @property
    def raw_data_file(self) -> bool:
        """The data file can be read as a raw image, without this file's tables."""
        return Autoclear.RAW_EXTERNAL_DATA in self.autoclear

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def subclusters(self) -> int:
        return SUBCLUSTERS if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        return self.cluster_size // self.subclusters

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def layout(self) -> Layout:
        """What it takes to read this image's L2 tables."""
        return Layout(self.cluster_bits, self.extended_l2, self.version, self.has_data_file)


def parse(data: bytes, *, name: str, file_size: int) -> Header:
    """The header at the beginning of the image file ``name``, which is ``file_size`` bytes long.

    ``data``: the first cluster, or more, or as much of it as exists; min(2 MiB, file) is always
    enough. Raises `CorruptImage` or `UnsupportedFeature`.
    """
    try:
        return _parse(data)
    except StreamError:
        raise CorruptImage(
            f"{name}: the file ends within its header, after {file_size} bytes"
        ) from None
    except (CorruptImage, UnsupportedFeature) as error:
        raise type(error)(f"{name}: {error}") from None


def _parse(data: bytes) -> Header:
    check(is_qcow2(data), "this is not a qcow2 image: it does not begin with QFI\\xfb")
    fields = HEADER_V2.parse(data)
    version, cluster_bits = fields.version, fields.cluster_bits
    if version not in (2, 3):
        raise UnsupportedFeature(f"qcow2 version {version}; 2 and 3 are supported")
    check(
        MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS,
        f"cluster_bits is {cluster_bits}; {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS} are allowed",
    )
    cluster_size = 1 << cluster_bits
    v3, additional = _version_3_fields(data, version, cluster_size)

    end = cluster_size
    backing_file = None
    if fields.backing_file_offset:
        end = fields.backing_file_offset
        length, room = fields.backing_file_size, min(MAX_BACKING_NAME, cluster_size - end)
        check(
            end <= cluster_size,
            f"backing_file_offset is {end:#x}; the first cluster ends at {cluster_size:#x}",
        )
        check(length <= room, f"backing_file_size is {length}; {room} bytes at most are allowed")
        backing_file = to_text(cut(data, end, length)) or None

    known, others = read_extensions(data[:cluster_size], v3.header_length, end)
    feature_names = read_feature_names(known.get(ExtensionType.FEATURE_NAME_TABLE, b""))
    incompatible, compression_type = _incompatible(v3, additional, feature_names)
    if fields.crypt_method != CryptMethod.NONE:
        raise UnsupportedFeature(f"it is encrypted ({_crypt_name(fields.crypt_method)})")
    check(
        ExtensionType.FULL_DISK_ENCRYPTION not in known,
        "it has a full disk encryption header, but crypt_method is 0",
    )

    autoclear = Autoclear(v3.autoclear_features)
    bitmaps = None
    if ExtensionType.BITMAPS in known:
        try:
            bitmaps = read_bitmaps(known[ExtensionType.BITMAPS], cluster_size)
        except CorruptImage:
            if Autoclear.BITMAPS in autoclear:
                raise
            others.append(Extension(ExtensionType.BITMAPS, known[ExtensionType.BITMAPS]))
    check(
        Autoclear.BITMAPS not in autoclear or bitmaps is not None,
        "autoclear bit 0 (bitmaps) is set, but the bitmaps extension is missing",
    )
    if Autoclear.RAW_EXTERNAL_DATA in autoclear:
        check(
            Incompatible.EXTERNAL_DATA_FILE in incompatible,
            "autoclear bit 1 (raw external data) is set, but the image has no external data file",
        )
        check(
            backing_file is None, "a raw external data file and a backing file exclude each other"
        )

    backing_format = known.get(ExtensionType.BACKING_FORMAT)
    check(
        len(backing_format or b"") <= MAX_BACKING_FORMAT,
        f"the backing format's name is longer than {MAX_BACKING_FORMAT} bytes",
    )
    data_file = known.get(ExtensionType.DATA_FILE)
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=fields.size,
        l1_size=fields.l1_size,
        l1_table_offset=fields.l1_table_offset,
        refcount_table_offset=fields.refcount_table_offset,
        refcount_table_clusters=fields.refcount_table_clusters,
        header_length=v3.header_length,
        backing_file=backing_file,
        backing_format=None if backing_format is None else to_text(backing_format),
        crypt_method=fields.crypt_method,
        nb_snapshots=fields.nb_snapshots,
        snapshots_offset=fields.snapshots_offset,
        incompatible=incompatible,
        compatible=Compatible(v3.compatible_features),
        autoclear=autoclear,
        refcount_order=v3.refcount_order,
        compression_type=compression_type,
        data_file=None if data_file is None else to_text(data_file),
        bitmaps=bitmaps,
        feature_names=feature_names,
        additional_fields=additional[1:],
        extensions=tuple(others),
    )
    _check_tables(header)
    return header


def _version_3_fields(data: bytes, version: int, cluster_size: int) -> tuple[Container, bytes]:
    """The fields from byte 72 on, and the additional fields behind them; version 2 has neither."""
    if version == 2:
        absent = Container(
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            refcount_order=REFCOUNT_ORDER_V2,
            header_length=HEADER_LENGTH_V2,
        )
        return absent, b""
    v3 = HEADER_V3_FIELDS.parse(data[HEADER_LENGTH_V2:])
    length = v3.header_length
    check(
        HEADER_LENGTH_V3 <= length <= cluster_size and length % 8 == 0,
        f"header_length is {length}; "
        f"multiples of 8 from {HEADER_LENGTH_V3} to {cluster_size} are allowed",
    )
    check(
        v3.refcount_order <= MAX_REFCOUNT_ORDER,
        f"refcount_order is {v3.refcount_order}; {MAX_REFCOUNT_ORDER} at most is allowed",
    )
    return v3, cut(data, HEADER_LENGTH_V3, length - HEADER_LENGTH_V3)


def _incompatible(
    v3: Container, additional: bytes, names: Mapping[tuple[int, int], str]
) -> tuple[Incompatible, CompressionType]:
    """The incompatible features, all of them known, and the compression type that they allow."""
    unknown = v3.incompatible_features & ~_KNOWN_INCOMPATIBLE
    if unknown:
        listed = format_features(FeatureType.INCOMPATIBLE, unknown, names)
        raise UnsupportedFeature(f"it needs unknown incompatible features: {listed}")
    incompatible = Incompatible(v3.incompatible_features)
    number = additional[0] if additional else 0
    check(
        (Incompatible.COMPRESSION_TYPE in incompatible) == (number != 0),
        f"compression_type is {number}, and the compression type bit (incompatible bit 3) "
        f"{'says otherwise' if number else 'demands another one'}",
    )
    if number not in list(CompressionType):
        raise UnsupportedFeature(f"compression_type is {number}; 0 (zlib) and 1 (zstd) are known")
    return incompatible, CompressionType(number)


def _check_tables(header: Header) -> None:
    """Every table that the header names: its size against the limits, its place, its alignment."""
    cluster_size = header.cluster_size
    if header.extended_l2:
        check(
            header.cluster_bits >= MIN_CLUSTER_BITS_EXTENDED,
            f"cluster_bits is {header.cluster_bits}; extended L2 entries need "
            f"{MIN_CLUSTER_BITS_EXTENDED} or more",
        )
    clusters = header.refcount_table_clusters
    most = MAX_REFCOUNT_TABLE_BYTES // cluster_size
    check(1 <= clusters <= most, f"refcount_table_clusters is {clusters}; 1 to {most} are allowed")
    check_place(
        "refcount_table_offset", header.refcount_table_offset, clusters * cluster_size, cluster_size
    )
    check(
        header.nb_snapshots <= MAX_SNAPSHOTS,
        f"nb_snapshots is {header.nb_snapshots}; {MAX_SNAPSHOTS} at most are allowed",
    )
    check_place(
        "snapshots_offset",
        header.snapshots_offset,
        header.nb_snapshots * SNAPSHOT_ENTRY.sizeof(),
        cluster_size,
    )
    l1_bytes = header.l1_size * L1E_SIZE
    check(
        l1_bytes <= MAX_L1_BYTES,
        f"l1_size is {header.l1_size}; {MAX_L1_BYTES // L1E_SIZE} at most are allowed",
    )
    needed = -(-header.size >> (header.cluster_bits + header.layout.l2_bits))
    check(
        header.l1_size >= needed,
        f"l1_size is {header.l1_size}; a size of {header.size} bytes needs {needed} or more",
    )
    check_place("l1_table_offset", header.l1_table_offset, l1_bytes, cluster_size)


def _crypt_name(crypt_method: int) -> str:
    known = crypt_method in list(CryptMethod)
    return CryptMethod(crypt_method).name if known else f"method {crypt_method}"


def encode(header: Header) -> bytes:
    """The first cluster of a file with ``header``: header, extensions, backing file name, zeroes.

    Known extensions come first, as QEMU orders them, then ``extensions``. ``header_length`` is not
    looked at: the header gets what its fields need. Raises `UsageError` if it does not fit.
    """
    additional = bytes([header.compression_type]) + header.additional_fields
    fixed = HEADER_LENGTH_V2
    if header.version >= 3:
        if not header.additional_fields and not header.compression_type:
            additional = b""
        additional += bytes(-len(additional) % 8)
        fixed = HEADER_LENGTH_V3 + len(additional)
    area = b"".join(_extensions(header)) + build_extension(ExtensionType.END, b"")
    backing_file = to_bytes(header.backing_file or "")
    backing_file_offset = fixed + len(area) if backing_file else 0
    used = fixed + len(area) + len(backing_file)
    if used > header.cluster_size:
        raise UsageError(
            f"the header needs {used} bytes, but a cluster has {header.cluster_size}: "
            "shorten the names in it, or choose larger clusters"
        )
    cluster = HEADER_V2.build(
        {
            "version": header.version,
            "backing_file_offset": backing_file_offset,
            "backing_file_size": len(backing_file),
            "cluster_bits": header.cluster_bits,
            "size": header.size,
            "crypt_method": header.crypt_method,
            "l1_size": header.l1_size,
            "l1_table_offset": header.l1_table_offset,
            "refcount_table_offset": header.refcount_table_offset,
            "refcount_table_clusters": header.refcount_table_clusters,
            "nb_snapshots": header.nb_snapshots,
            "snapshots_offset": header.snapshots_offset,
        }
    )
    if header.version >= 3:
        cluster += HEADER_V3_FIELDS.build(
            {
                "incompatible_features": header.incompatible,
                "compatible_features": header.compatible,
                "autoclear_features": header.autoclear,
                "refcount_order": header.refcount_order,
                "header_length": fixed,
            }
        )
        cluster += additional
    return bytes((cluster + area + backing_file).ljust(header.cluster_size, b"\0"))


def _extensions(header: Header) -> Iterator[bytes]:
    """All header extensions but the final one."""
    if header.backing_format is not None:
        yield build_extension(ExtensionType.BACKING_FORMAT, to_bytes(header.backing_format))
    if header.data_file is not None:
        yield build_extension(ExtensionType.DATA_FILE, to_bytes(header.data_file))
    if header.feature_names:
        yield build_feature_names(header.feature_names)
    if header.bitmaps is not None:
        yield build_bitmaps(header.bitmaps)
    for extension in header.extensions:
        yield build_extension(extension.type, extension.data)
