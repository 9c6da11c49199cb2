"""The images that the crash tests write to, and the requests they are written with, from seeds.

Images are small, so that thousands of their states can be looked at, and each is the place of some
rule: small clusters and wide refcounts make refcount tables grow; full ones need COW from backing
files, snapshots and compressed clusters. qemu-img and qemu-io make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from interop import peers
from interop.soak.cells import CELL, Request, stamped

SNAPSHOT = "before"
INCOMPATIBLE = 79  # the byte of the header that has the incompatible features 0 to 7
AUTOCLEAR = 88  # where the header has its autoclear features, 64 bits
Files = Mapping[str, bytes]  # by name
K, M = 1 << 10, 1 << 20
FULL = 2_021_376  # with clusters of 512 bytes: the tables, and a few clusters less than 2 MiB


@dataclass(frozen=True)
class Plan:
    """An image. ``filled``: the part of the guest that is written before the run begins, in runs of
    clusters; or ``full``, so many bytes of it from the beginning.

    ``bitmaps``: the granularities of enabled ones; beside them there is a disabled one.
    ``autoclear``: a feature that nobody knows is there, and must not be once something changes.
    """

    name: str
    size: int
    cluster: int = 4 * K
    compat: str = "1.1"
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy: bool = False
    backing: str = ""  # "raw" or "qcow2"
    snapshot: bool = False
    compressed: bool = False
    data_file: str = ""  # "plain" or "raw"
    bitmaps: tuple[int, ...] = ()
    autoclear: bool = False
    filled: float = 0.3
    full: int = 0
    format: str = "qcow2"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a run may change, the image first."""
        return (f"{self.name}.{self.format}",) + (f"{self.name}.data",) * bool(self.data_file)

    @property
    def raw_data_file(self) -> bool:
        return self.data_file == "raw"

    @property
    def granule(self) -> int:
        """What is discarded as a whole."""
        return self.cluster if self.format == "qcow2" else 4 * K


PLANS = (
    Plan("tiny", 64 * K, 512),
    Plan("small", 256 * K, 512),
    Plan("plain", 2 * M, 4 * K),
    Plan("usual", 4 * M, 64 * K),
    Plan("one-bit", 512 * K, 1 * K, refcount_bits=1),
    Plan("two-bit", 512 * K, 1 * K, refcount_bits=2, snapshot=True),
    Plan("four-bit", 1 * M, 4 * K, refcount_bits=4, backing="qcow2"),
    Plan("eight-bit", 512 * K, 1 * K, refcount_bits=8, backing="raw", snapshot=True),
    Plan("wide", 512 * K, 1 * K, refcount_bits=32, compressed=True),
    Plan("blocks", 256 * K, 512, refcount_bits=64),
    # A refcount table of one cluster speaks of 2 MiB here: it has to grow, and it does soon.
    Plan("growing", 2 * M + 512 * K, 512, refcount_bits=64, full=FULL),
    Plan("growing-again", 2 * M + 512 * K, 512, refcount_bits=64, full=FULL, snapshot=True),
    Plan("shared", 1 * M, 4 * K, snapshot=True, filled=0.7),
    Plan("packed", 1 * M, 4 * K, compressed=True, snapshot=True, filled=0.7),
    Plan("overlay", 1 * M, 64 * K, backing="qcow2", filled=0.1),
    Plan("subclusters", 2 * M, 16 * K, extended_l2=True, backing="raw"),
    Plan("subclusters-shared", 1 * M, 16 * K, extended_l2=True, snapshot=True, compressed=True),
    Plan("apart", 1 * M, 4 * K, data_file="plain", backing="raw"),
    Plan("apart-raw", 1 * M, 4 * K, data_file="raw"),
    Plan("apart-subclusters", 1 * M, 16 * K, extended_l2=True, data_file="raw"),
    Plan("bitmaps", 512 * K, 1 * K, bitmaps=(512, 64 * K), snapshot=True),
    Plan("bitmaps-apart", 1 * M, 64 * K, bitmaps=(4 * K,), data_file="plain"),
    Plan("old", 512 * K, 1 * K, compat="0.10", snapshot=True),
    Plan("old-overlay", 512 * K, 4 * K, compat="0.10", backing="raw", compressed=True),
    Plan("unknown", 512 * K, 4 * K, autoclear=True),
    Plan("lazy", 512 * K, 1 * K, lazy=True, backing="qcow2"),
    Plan("lazy-shared", 1 * M, 4 * K, lazy=True, snapshot=True, bitmaps=(4 * K,)),
)
RAW = Plan("plain-file", 1 * M, format="raw")


def build(plan: Plan, folder: Path) -> Path:
    """Make the image of a plan in an empty folder; its path."""
    rng = Random(plan.name)
    image = folder / plan.files[0]
    if plan.format == "raw":
        image.write_bytes(rng.randbytes(plan.size))
        return image
    options = [
        f"cluster_size={plan.cluster}",
        f"compat={plan.compat}",
        f"refcount_bits={plan.refcount_bits}",
        f"extended_l2={'on' if plan.extended_l2 else 'off'}",
        f"lazy_refcounts={'on' if plan.lazy else 'off'}",
    ]
    if plan.data_file:
        raw = "on" if plan.data_file == "raw" else "off"
        options += [f"data_file={plan.files[1]}", f"data_file_raw={raw}"]
    below = _backing(plan, folder, rng)
    line = ["create", "-q", "-f", "qcow2", "-o", ",".join(options), *below, image.name]
    peers.run("qemu-img", *line, str(plan.size), cwd=folder)
    _write(plan, image, rng, plan.filled, compressed=plan.compressed)
    if plan.snapshot:
        peers.run("qemu-img", "snapshot", "-c", SNAPSHOT, image.name, cwd=folder)
        if not plan.full:
            _write(plan, image, rng, plan.filled / 4)
    for granularity in plan.bitmaps:
        add = ["bitmap", "--add", "-g", str(granularity), image.name, f"b{granularity}"]
        peers.run("qemu-img", *add, cwd=folder)
    if plan.bitmaps:
        peers.run("qemu-img", "bitmap", "--add", "--disable", image.name, "off", cwd=folder)
        _write(plan, image, rng, 0.02)
    if plan.autoclear:
        with image.open("r+b") as file:
            file.seek(AUTOCLEAR)
            file.write(b"\x40")
    return image


def is_dirty(image: bytes) -> bool:
    """Whether the dirty bit is set, incompatible feature 0."""
    return image[INCOMPATIBLE] & 1 != 0


def is_corrupt(image: bytes | bytearray) -> bool:
    """Whether the corrupt bit is set, incompatible feature 1."""
    return image[INCOMPATIBLE] & 2 != 0


def unknown_autoclear(image: bytes | bytearray) -> int:
    """The autoclear bits that docs/interop/qcow2.rst does not define."""
    return int.from_bytes(image[AUTOCLEAR : AUTOCLEAR + 8], "big") & ~3


def _backing(plan: Plan, folder: Path, rng: Random) -> list[str]:
    """A shorter one below, full of noise."""
    if not plan.backing:
        return []
    raw = folder / "base.raw"
    raw.write_bytes(rng.randbytes(plan.size * 3 // 4 // 512 * 512))
    if plan.backing == "raw":
        return ["-b", raw.name, "-F", "raw"]
    line = ["convert", "-q", "-f", "raw", "-O", "qcow2", raw.name, "base.qcow2"]
    peers.run("qemu-img", *line, cwd=folder)
    return ["-b", "base.qcow2", "-F", "qcow2"]


def _write(plan: Plan, image: Path, rng: Random, part: float, *, compressed: bool = False) -> None:
    """Runs of clusters of noise, and some of zeroes, over ``part`` of the guest."""
    if plan.full:
        noise = image.with_name("noise")
        noise.write_bytes(rng.randbytes(plan.full))
        write = f"write -q -s {noise.name} 0 {plan.full}"
        peers.run("qemu-io", "-f", "qcow2", "-c", write, image.name, cwd=image.parent)
        noise.unlink()
        return
    clusters = plan.size // plan.cluster
    left = max(int(clusters * part), 1)
    commands: list[str] = []
    if compressed:  # first: they want clusters that nothing was written to
        for index in rng.sample(range(clusters), clusters // 3):
            where = f"{index * plan.cluster} {plan.cluster}"
            commands.append(f"write -q -c -P {rng.randrange(1, 255)} {where}")
        left //= 3
    noises: list[Path] = []
    while left > 0:
        count = min(rng.randrange(1, max(clusters // 8, 2)), left)
        where = f"{rng.randrange(clusters - count + 1) * plan.cluster} {count * plan.cluster}"
        left -= count
        if part < 0.6 and rng.random() < 0.2:
            commands.append(f"write -q -z -u {where}")
            continue
        noises.append(image.parent / f"noise{len(noises)}")
        noises[-1].write_bytes(rng.randbytes(count * plan.cluster))
        commands.append(f"write -q -s {noises[-1].name} {where}")
    line = [word for command in commands for word in ("-c", command)]
    peers.run("qemu-io", "-d", "unmap", "-f", "qcow2", *line, image.name, cwd=image.parent)
    for noise in noises:
        noise.unlink()


def requests(plan: Plan, rng: Random, count: int, first_number: int) -> Iterator[list[Request]]:
    """``count`` requests, in groups that are asked in one call (adjacent writes)."""
    cells = plan.size // CELL
    granule = plan.granule // CELL
    hot = plan.full // CELL or rng.randrange(
        cells
    )  # where requests meet, and clusters are freed and used again
    number = first_number
    while number < first_number + count:
        kind = rng.choices(("write", "zeroes", "discard", "flush"), (58, 14, 16, 12))[0]
        if kind == "flush":
            yield [Request(number, "flush")]
            number += 1
            continue
        first, last = _range(cells, granule, hot, rng)
        group: list[Request] = []
        for _ in range(rng.choice((1, 1, 1, 1, 3)) if kind == "write" else 1):
            group.append(_request(plan, number, kind, first, last))
            number += 1
            first, last = last, min(2 * last - first, cells)
            if first == last:
                break
        fua = rng.random() < 0.1
        for request in group:
            request.fua = fua
        yield group


def _request(plan: Plan, number: int, kind: str, first: int, last: int) -> Request:
    payload = stamped(number, first, last) if kind == "write" else None
    sure = first, last
    if kind == "discard" and plan.compat == "0.10" and plan.backing:
        sure = first, first  # there are no zero clusters, and nothing else hides what is below
    elif kind == "discard":
        # What it does to a cluster, or subcluster, in part, is open; of whole ones it is sure.
        granule = plan.granule // CELL
        whole = -(-first // granule) * granule, last // granule * granule
        sure = whole if whole[0] < whole[1] else (first, first)
    return Request(number, kind, first, last, *sure, payload=payload)


def _range(cells: int, granule: int, hot: int, rng: Random) -> tuple[int, int]:
    """Parts of a cluster, clusters, and what goes over their edges."""
    unit = rng.choice((1, 8, 8, granule, granule))
    units = rng.choice((1, 1, 2, 3, rng.randrange(1, 12)))
    length = min(unit * units, 24 * granule, 128 * K // CELL, cells)
    at = rng.randrange(cells)
    if rng.random() < 0.6:
        at = (hot + rng.randrange(6 * granule)) % cells
    first = min(at // unit * unit, cells - length)
    return first, first + length
