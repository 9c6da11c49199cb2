"""The images that are written to: rows in which every legal pair of what qcow2 can be meets.

`rows` decides everything (pure, from a seed), `build` runs qemu-img and qemu-io. What is legal is
a rule of the qcow2 specification, or what qemu-img makes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from random import Random

from interop import peers, samples

Choice = dict[str, str]
Value = tuple[str, str]  # a factor and one of its values
Pair = tuple[Value, Value]  # in the order of `FACTORS`

FACTORS = {
    "cluster_size": ["512", "4k", "64k", "2M"],
    "extended_l2": ["off", "on"],
    "compat": ["0.10", "1.1"],
    "refcount_bits": ["1", "2", "4", "8", "16", "32", "64"],
    "lazy_refcounts": ["off", "on"],
    "backing": ["none", "raw", "short", "long", "v2"],
    "compression": ["none", "zlib", "zstd"],
    "data_file": ["none", "file", "raw"],
    "snapshot": ["no", "yes"],
    "bitmaps": ["none", "fine", "coarse", "several"],
    "preallocation": ["off", "metadata"],
}
BYTES = {"512": 512, "4k": 4 << 10, "64k": 64 << 10, "2M": 2 << 20}
SIZES = {"512": 1 << 20, "4k": 3 << 20, "64k": 8 << 20, "2M": 24 << 20}
# Name, granularity, enabled.
Bitmap = tuple[str, int, bool]
BITMAPS: dict[str, list[Bitmap]] = {
    "none": [],
    "fine": [("fine", 512, True)],
    "coarse": [("coarse", 1 << 20, True)],
    "several": [("a", 4 << 10, True), ("b", 64 << 10, True), ("still", 8 << 10, False)],
}
SNAPSHOT = "before"
_POOL = 4000  # choices at random, in which every legal pair meets


def legal(choice: Choice) -> bool:
    """Whether qemu-img makes such an image."""
    version_2 = choice["compat"] == "0.10"
    data_file = choice["data_file"] != "none"
    illegal = (
        # Features of version 3.
        version_2 and choice["extended_l2"] == "on",
        version_2 and choice["refcount_bits"] != "16",
        version_2 and choice["lazy_refcounts"] == "on",
        version_2 and choice["compression"] == "zstd",
        version_2 and data_file,
        version_2 and choice["bitmaps"] != "none",
        # A subcluster has at least 512 bytes.
        choice["extended_l2"] == "on" and BYTES[choice["cluster_size"]] < 16 << 10,
        # A cluster that a snapshot shares has a refcount of 2.
        choice["refcount_bits"] == "1" and choice["snapshot"] == "yes",
        # And one of several compressed clusters has more than 3.
        choice["refcount_bits"] == "2"
        and choice["snapshot"] == "yes"
        and choice["compression"] != "none",
        # What lies in a data file is neither compressed nor counted; what others may read as raw
        # is all there.
        data_file and choice["compression"] != "none",
        data_file and choice["snapshot"] == "yes",
        choice["data_file"] == "raw" and choice["backing"] != "none",
        # A raw data file has its metadata preallocated anyway.
        choice["data_file"] == "raw" and choice["preallocation"] != "metadata",
        # What is preallocated hides the backing file, but for subclusters.
        choice["preallocation"] == "metadata"
        and choice["backing"] != "none"
        and choice["extended_l2"] == "off",
        # Compressed clusters are written where nothing is allocated yet.
        choice["preallocation"] == "metadata" and choice["compression"] != "none",
    )
    return not any(illegal)


def pairs(choice: Choice) -> list[Pair]:
    return list(combinations(choice.items(), 2))


def drawn(rng: Random) -> Iterator[Choice]:
    """Legal choices without end."""
    while True:
        choice = {factor: rng.choice(values) for factor, values in FACTORS.items()}
        if legal(choice):
            yield choice


@dataclass(frozen=True)
class Row:
    """One image: what it is, its size, and the seed of its content."""

    name: str
    choice: Choice
    size: int
    seed: int

    @property
    def cluster_size(self) -> int:
        return BYTES[self.choice["cluster_size"]]

    @property
    def subcluster_size(self) -> int:
        """What has a state of its own."""
        return self.cluster_size // (32 if self.choice["extended_l2"] == "on" else 1)

    @property
    def hides_what_is_discarded(self) -> bool:
        """Whether a discarded cluster has to read as zeroes: version 2 has no zero clusters."""
        return self.choice["compat"] == "1.1"

    @property
    def bitmaps(self) -> list[Bitmap]:
        return BITMAPS[self.choice["bitmaps"]]

    def __str__(self) -> str:
        return f"{self.name}: {' '.join(f'{key}={value}' for key, value in self.choice.items())}"


def rows(seed: int = 1, count: int = 0) -> list[Row]:
    """At least ``count`` rows; every pair of values that is legal meets in one of them."""
    rng = Random(seed)
    pool = list(islice(drawn(rng), _POOL))
    bits: defaultdict[Pair, int] = defaultdict(lambda: 1 << len(bits))
    met = [sum(bits[pair] for pair in pairs(choice)) for choice in pool]
    wanted, chosen = (1 << len(bits)) - 1, list[Choice]()
    while wanted or len(chosen) < count:
        best = max(range(_POOL), key=lambda number: (met[number] & wanted).bit_count())
        best = best if wanted else rng.randrange(_POOL)
        wanted &= ~met[best]
        chosen.append(pool[best])
    rng.shuffle(chosen)
    return [row(f"m{number:02}", choice, seed) for number, choice in enumerate(chosen)]


def row(name: str, choice: Choice, seed: int) -> Row:
    rng = Random(f"{seed} {name}")
    size = SIZES[choice["cluster_size"]] + rng.choice([0, rng.randrange(1, 1024) * 512])
    return Row(name, choice, size, rng.randrange(1 << 30))


@dataclass(frozen=True)
class Image:
    """What was built: the image, its data file, and the files below it, which nothing writes."""

    row: Row
    path: Path
    data_file: Path | None
    backing: tuple[Path, ...]


def build(row: Row, folder: Path) -> Image:
    """Make the image of a row in a folder of its own; twice the same, but for the folder's name in
    it. Raises AssertionError if a tool fails.
    """
    folder.mkdir()
    rng = Random(row.seed)
    choice, path, data_file = row.choice, folder / "disk.qcow2", None
    backing = backed(row, folder, rng)
    options = ["cluster_size", "extended_l2", "compat", "refcount_bits", "lazy_refcounts"]
    if choice["data_file"] != "none":
        data_file = folder / "disk.data"
    values = [f"{option}={choice[option]}" for option in options]
    values.append(f"preallocation={choice['preallocation']}")
    if choice["compression"] == "zstd":
        values.append("compression_type=zstd")
    if data_file:
        raw = "on" if choice["data_file"] == "raw" else "off"
        values += [f"data_file={data_file}", f"data_file_raw={raw}"]
    below = ["-b", backing[0].name, "-F", backing[0].suffix[1:]] if backing else []
    line = ["create", "-q", "-f", "qcow2", "-o", ",".join(values), *below, path, str(row.size)]
    peers.run("qemu-img", *line)
    if choice["compression"] != "none":
        samples.qemu_io(path, *compressed(row, folder, rng))
    discards = choice["data_file"] != "raw"  # which qemu does not carry through to such a file
    samples.qemu_io(path, *changes(row.size, row.cluster_size, rng, discards=discards))
    if choice["snapshot"] == "yes":
        peers.run("qemu-img", "snapshot", "-c", SNAPSHOT, path)
    for name, granularity, _ in row.bitmaps:
        peers.run("qemu-img", "bitmap", "--add", "-g", str(granularity), path, name)
    samples.qemu_io(path, *changes(row.size, row.cluster_size, rng, discards=discards))
    for name, _, enabled in row.bitmaps:
        if not enabled:
            peers.run("qemu-img", "bitmap", "--disable", path, name)
    return Image(row, path, data_file, backing)


def backed(row: Row, folder: Path, rng: Random) -> tuple[Path, ...]:
    """The layers below an image, from the one next to it."""
    kind, size = row.choice["backing"], row.size
    if kind == "none":
        return ()
    change = rng.randrange(1, size // 2048) * 512
    size += {"short": -change, "long": change}.get(kind, 0)
    base = folder / "base.raw"
    samples.sparse_file(base, size, rng.randrange(1 << 30))
    if kind == "raw":
        return (base,)
    path = folder / "backing.qcow2"
    compat = "compat=0.10" if kind == "v2" else "compat=1.1"
    create = ["create", "-q", "-f", "qcow2", "-o", compat, "-b", base.name, "-F", "raw"]
    peers.run("qemu-img", *create, path, str(size))
    samples.qemu_io(path, *changes(size, 64 << 10, rng))
    return path, base


def changes(size: int, cluster: int, rng: Random, *, discards: bool = True) -> Iterator[str]:
    """Commands of qemu-io: data, zeroes and discards, some of whole clusters."""
    kinds = {"write": 5, "write -z": 1, "write -z -u": 1, "discard": 2 * discards}
    for kind in rng.choices(list(kinds), list(kinds.values()), k=10):
        unit = rng.choice([512, cluster])
        length = rng.randrange(1, max(2, min(size // 6, 4 * cluster) // unit + 1)) * unit
        offset = rng.randrange(0, size - length + 1) // unit * unit
        pattern = f" -P {rng.randrange(1, 256)}" if kind == "write" else ""
        yield f"{kind} -q{pattern} {offset} {length}"


def compressed(row: Row, folder: Path, rng: Random) -> Iterator[str]:
    """Every third cluster: half of them words, half of them what hardly shrinks."""
    words, noise = folder / "words", folder / "noise"
    words.write_bytes(bytes(rng.choices(b"etaoin shrdlu\n", k=1 << 16)))
    noise.write_bytes(rng.randbytes(40 << 10) + bytes(24 << 10))
    clusters = row.size // row.cluster_size
    for index in rng.sample(range(clusters), min(clusters // 3, 60)):
        place = f"{index * row.cluster_size} {row.cluster_size}"
        yield f"write -q -c -s {rng.choice([words, noise])} {place}"
