"""The header of a qcow2 file and its extensions (pure).

docs/interop/qcow2.rst, "Header" to "Full disk encryption header pointer". `parse` refuses what the
specification or QEMU's limits forbid, with one line that names the file, the field, its value and
what is allowed. What it lets through can be trusted: tables are aligned, bounded, and end below
2^63. `encode` is the way back; it keeps what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from construct import Container, StreamError

from pynbd.block.qcow2.entries import Layout
from pynbd.block.qcow2.format import (
    BITMAPS_EXTENSION,
    EXTENSION,
    FEATURE_NAME,
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    HEADER_V2,
    HEADER_V3_FIELDS,
    L1E_SIZE,
    MAGIC,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_OFFSET,
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

PROBE = MAGIC
_KNOWN_INCOMPATIBLE = sum(Incompatible)


def is_qcow2(first_bytes: bytes) -> bool:
    """Whether a file that begins with ``first_bytes`` (4 or more) says that it is qcow2."""
    return first_bytes[:4] == PROBE


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory is: its offset and size in bytes, and its number of entries."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class Extension:
    """A header extension as stored: its type and its data without padding."""

    type: int
    data: bytes


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
    bitmaps: BitmapsExtension | None = None
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    # What no field above speaks of, kept for rewriting: additional fields behind compression_type,
    # and extensions. A bitmaps extension that is not marked as consistent is one of them.
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
    def l2_bits(self) -> int:
        """Of a guest cluster's number: how many low bits index its L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

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
    _check(is_qcow2(data), "this is not a qcow2 image: it does not begin with QFI\\xfb")
    fields = HEADER_V2.parse(data)
    version, cluster_bits = fields.version, fields.cluster_bits
    if version not in (2, 3):
        raise UnsupportedFeature(f"qcow2 version {version}; 2 and 3 are supported")
    _check(
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
        _check(
            end <= cluster_size,
            f"backing_file_offset is {end:#x}; the first cluster ends at {cluster_size:#x}",
        )
        _check(length <= room, f"backing_file_size is {length}; {room} bytes at most are allowed")
        backing_file = _text(_slice(data, end, length)) or None

    known, others = _extensions(data[:cluster_size], v3.header_length, end)
    feature_names = _feature_names(known.pop(ExtensionType.FEATURE_NAME_TABLE, b""))
    incompatible, compression_type = _incompatible(v3, additional, feature_names)
    if fields.crypt_method != CryptMethod.NONE:
        raise UnsupportedFeature(f"it is encrypted ({_crypt_name(fields.crypt_method)})")
    _check(
        ExtensionType.FULL_DISK_ENCRYPTION not in known,
        "it has a full disk encryption header, but crypt_method is 0",
    )

    autoclear = Autoclear(v3.autoclear_features)
    bitmaps = None
    if Autoclear.BITMAPS in autoclear:
        _check(
            ExtensionType.BITMAPS in known,
            "autoclear bit 0 (bitmaps) is set, but the bitmaps extension is missing",
        )
        bitmaps = _bitmaps(known.pop(ExtensionType.BITMAPS), cluster_size)
    elif ExtensionType.BITMAPS in known:
        others.append(Extension(ExtensionType.BITMAPS, known.pop(ExtensionType.BITMAPS)))
    if Autoclear.RAW_EXTERNAL_DATA in autoclear:
        _check(
            Incompatible.EXTERNAL_DATA_FILE in incompatible,
            "autoclear bit 1 (raw external data) is set, but the image has no external data file",
        )
        _check(
            backing_file is None, "a raw external data file and a backing file exclude each other"
        )

    backing_format = known.get(ExtensionType.BACKING_FORMAT)
    _check(
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
        backing_format=None if backing_format is None else _text(backing_format),
        crypt_method=fields.crypt_method,
        nb_snapshots=fields.nb_snapshots,
        snapshots_offset=fields.snapshots_offset,
        incompatible=incompatible,
        compatible=Compatible(v3.compatible_features),
        autoclear=autoclear,
        refcount_order=v3.refcount_order,
        compression_type=compression_type,
        data_file=None if data_file is None else _text(data_file),
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
    _check(
        HEADER_LENGTH_V3 <= length <= cluster_size and length % 8 == 0,
        f"header_length is {length}; "
        f"multiples of 8 from {HEADER_LENGTH_V3} to {cluster_size} are allowed",
    )
    _check(
        v3.refcount_order <= MAX_REFCOUNT_ORDER,
        f"refcount_order is {v3.refcount_order}; {MAX_REFCOUNT_ORDER} at most is allowed",
    )
    return v3, _slice(data, HEADER_LENGTH_V3, length - HEADER_LENGTH_V3)


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
    _check(
        (Incompatible.COMPRESSION_TYPE in incompatible) == (number != 0),
        f"compression_type is {number}, and the compression type bit (incompatible bit 3) "
        f"{'says otherwise' if number else 'demands another one'}",
    )
    if number not in list(CompressionType):
        raise UnsupportedFeature(f"compression_type is {number}; 0 (zlib) and 1 (zstd) are known")
    return incompatible, CompressionType(number)


def _extensions(data: bytes, offset: int, end: int) -> tuple[dict[int, bytes], list[Extension]]:
    """The extensions between ``offset`` and ``end``: known ones by type, the others in order."""
    known: dict[int, bytes] = {}
    others: list[Extension] = []
    while offset + EXTENSION.sizeof() <= end:
        head = EXTENSION.parse(data[offset:])
        if head.type == ExtensionType.END:
            break
        offset += EXTENSION.sizeof()
        _check(
            head.length <= end - offset,
            f"the header extension {head.type:#010x} at {offset - 8:#x} is {head.length} bytes "
            f"long; there is room for {end - offset}",
        )
        body = _slice(data, offset, head.length)
        if head.type in list(ExtensionType):
            _check(
                head.type not in known,
                f"the header extension {head.type:#010x} appears more than once",
            )
            known[head.type] = body
        else:
            others.append(Extension(head.type, body))
        offset += -(-head.length // 8) * 8
    return known, others


def _feature_names(table: bytes) -> dict[tuple[int, int], str]:
    size = FEATURE_NAME.sizeof()
    whole = len(table) - len(table) % size
    entries = (FEATURE_NAME.parse(table[at : at + size]) for at in range(0, whole, size))
    return {(entry.type, entry.bit): _text(entry.name.split(b"\0")[0]) for entry in entries}


def _bitmaps(data: bytes, cluster_size: int) -> BitmapsExtension:
    size = BITMAPS_EXTENSION.sizeof()
    _check(len(data) == size, f"the bitmaps extension is {len(data)} bytes long, not {size}")
    fields = BITMAPS_EXTENSION.parse(data)
    _check(fields.reserved == 0, "the reserved field of the bitmaps extension is not 0")
    _check(
        1 <= fields.nb_bitmaps <= MAX_BITMAPS,
        f"nb_bitmaps is {fields.nb_bitmaps}; 1 to {MAX_BITMAPS} are allowed",
    )
    _check(
        fields.bitmap_directory_size <= MAX_BITMAP_DIRECTORY_BYTES,
        f"bitmap_directory_size is {fields.bitmap_directory_size}; "
        f"{MAX_BITMAP_DIRECTORY_BYTES} at most are allowed",
    )
    _check_place(
        "bitmap_directory_offset",
        fields.bitmap_directory_offset,
        fields.bitmap_directory_size,
        cluster_size,
    )
    return BitmapsExtension(
        fields.nb_bitmaps, fields.bitmap_directory_size, fields.bitmap_directory_offset
    )


def _check_tables(header: Header) -> None:
    """Every table that the header names: its size against the limits, its place, its alignment."""
    cluster_size = header.cluster_size
    if header.extended_l2:
        _check(
            header.cluster_bits >= MIN_CLUSTER_BITS_EXTENDED,
            f"cluster_bits is {header.cluster_bits}; extended L2 entries need "
            f"{MIN_CLUSTER_BITS_EXTENDED} or more",
        )
    clusters = header.refcount_table_clusters
    most = MAX_REFCOUNT_TABLE_BYTES // cluster_size
    _check(1 <= clusters <= most, f"refcount_table_clusters is {clusters}; 1 to {most} are allowed")
    _check_place(
        "refcount_table_offset", header.refcount_table_offset, clusters * cluster_size, cluster_size
    )
    _check(
        header.nb_snapshots <= MAX_SNAPSHOTS,
        f"nb_snapshots is {header.nb_snapshots}; {MAX_SNAPSHOTS} at most are allowed",
    )
    _check_place(
        "snapshots_offset",
        header.snapshots_offset,
        header.nb_snapshots * SNAPSHOT_ENTRY.sizeof(),
        cluster_size,
    )
    l1_bytes = header.l1_size * L1E_SIZE
    _check(
        l1_bytes <= MAX_L1_BYTES,
        f"l1_size is {header.l1_size}; {MAX_L1_BYTES // L1E_SIZE} at most are allowed",
    )
    needed = -(-header.size >> (header.cluster_bits + header.l2_bits))
    _check(
        header.l1_size >= needed,
        f"l1_size is {header.l1_size}; a size of {header.size} bytes needs {needed} or more",
    )
    _check_place("l1_table_offset", header.l1_table_offset, l1_bytes, cluster_size)


def _check_place(field_name: str, offset: int, length: int, cluster_size: int) -> None:
    _check(
        offset % cluster_size == 0,
        f"{field_name} is {offset:#x}; multiples of the cluster size {cluster_size} are allowed",
    )
    _check(
        offset + length <= MAX_OFFSET,
        f"{field_name} is {offset:#x}; with {length} bytes it would end beyond 2^63 - 1",
    )


def _check(allowed: bool, otherwise: str) -> None:
    if not allowed:
        raise CorruptImage(otherwise)


def _slice(data: bytes, offset: int, length: int) -> bytes:
    """Like a slice, but raises `StreamError` if it is cut short, as construct does for fields."""
    piece = data[offset : offset + length]
    if len(piece) < length:
        raise StreamError
    return piece


def _text(raw: bytes) -> str:
    """A name from the image. Bytes that are not UTF-8 survive the way there and back."""
    return raw.decode("utf-8", "surrogateescape")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


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
    area = b"".join(
        EXTENSION.build({"type": kind, "length": len(body)}) + body + bytes(-len(body) % 8)
        for kind, body in _encoded_extensions(header)
    )
    backing_file = _raw(header.backing_file or "")
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


def _encoded_extensions(header: Header) -> Iterator[tuple[int, bytes]]:
    if header.backing_format is not None:
        yield ExtensionType.BACKING_FORMAT, _raw(header.backing_format)
    if header.data_file is not None:
        yield ExtensionType.DATA_FILE, _raw(header.data_file)
    if header.feature_names:
        yield (
            ExtensionType.FEATURE_NAME_TABLE,
            b"".join(
                FEATURE_NAME.build({"type": kind, "bit": bit, "name": _raw(text).ljust(46, b"\0")})
                for (kind, bit), text in header.feature_names.items()
            ),
        )
    if header.bitmaps is not None:
        yield (
            ExtensionType.BITMAPS,
            BITMAPS_EXTENSION.build(
                {
                    "nb_bitmaps": header.bitmaps.nb_bitmaps,
                    "reserved": 0,
                    "bitmap_directory_size": header.bitmaps.directory_size,
                    "bitmap_directory_offset": header.bitmaps.directory_offset,
                }
            ),
        )
    for extension in header.extensions:
        yield extension.type, extension.data
    yield ExtensionType.END, b""
