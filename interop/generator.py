"""Chains of images in which every legal pair of qcow2 features meets, made by qemu's own tools.

`plan` decides everything (pure, from a seed), `build` runs qemu-img and qemu-io. The factors of
`pairs` describe the active layer; the layers below are drawn at random from what is legal, and a
base may be raw. ``python -m interop.generator [SEED]`` prints the coverage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from interop import peers
from interop.pairs import FACTORS, Choice, complete, cover, coverage

SEED = 20260101
COUNT = 110
SECTOR = 512
UNITS = {"512": 512, "4k": 4 << 10, "64k": 64 << 10, "1M": 1 << 20, "2M": 2 << 20}
# Enough clusters to be interesting, few enough to be quick.
SIZES = {"512": 1 << 20, "4k": 3 << 20, "64k": 6 << 20, "2M": 40 << 20}
SNAPSHOT = "before"


@dataclass(frozen=True)
class Bitmap:
    name: str
    granularity: int
    enabled: bool


@dataclass(frozen=True)
class Layer:
    """One image: its options, and what qemu-io writes before and after snapshot and bitmaps."""

    choice: Choice
    format: str
    size: int
    bitmaps: tuple[Bitmap, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def snapshot(self) -> bool:
        return self.choice["snapshot"] == "yes"


@dataclass(frozen=True)
class ChainPlan:
    """``layers`` from the base to the active layer, whose choices are those of the chain."""

    id: str
    choice: Choice
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Chain:
    """What was built: ``layers`` from the base to ``top``, and the bitmaps of ``top``."""

    top: Path
    layers: tuple[Path, ...]
    bitmaps: tuple[str, ...]


def plan(seed: int = SEED, count: int = COUNT) -> list[ChainPlan]:
    rng = Random(seed)
    return [chain_plan(f"c{i:03}", choice, rng) for i, choice in enumerate(cover(count, rng))]


def chain_plan(name: str, choice: Choice, rng: Random) -> ChainPlan:
    depth = int(choice["layers"])
    choices, sizes = [choice], [guest_size(choice, rng)]
    for level in range(depth - 1, 0, -1):
        sizes.append(backing_size(sizes[-1], choices[-1]["backing"], rng))
        choices.append(lower_choice(level, sizes[-1], rng))
    layers = [layer_plan(c, size, rng) for c, size in zip(choices, sizes, strict=True)]
    if depth > 1 and rng.random() < 0.4:
        layers[-1] = raw_plan(layers[-1], rng)
    return ChainPlan(name, choice, tuple(reversed(layers)))


def lower_choice(level: int, size: int, rng: Random) -> Choice:
    """A layer with ``level - 1`` others below it; bitmaps and snapshots are for the active one."""
    cluster = rng.choice([name for name in FACTORS["cluster"] if 8 * UNITS[name] <= size])
    fixed = {"layers": str(level), "cluster": cluster, "snapshot": "no", "bitmap": "none"}
    choice = None
    while choice is None:
        choice = complete(fixed.items(), set(), rng)
    return choice


def guest_size(choice: Choice, rng: Random) -> int:
    """A multiple of 512, and mostly not one of the cluster."""
    size = max(SIZES[choice["cluster"]], 12 << 20 if choice["bitmap"] == "1M" else 0)
    return size + (rng.randrange(1, 1024) * SECTOR if rng.random() < 0.8 else 0)


def backing_size(overlay: int, length: str, rng: Random) -> int:
    change = rng.randrange(1, overlay // (4 * SECTOR)) * SECTOR
    return overlay + {"equal": 0, "short": -change, "long": change}[length]


def layer_plan(choice: Choice, size: int, rng: Random) -> Layer:
    cluster = UNITS[choice["cluster"]]
    bitmaps = list[Bitmap]()
    if choice["bitmap"] != "none":
        bitmaps.append(Bitmap("b0", UNITS[choice["bitmap"]], True))
        if rng.random() < 0.5:
            bitmaps.append(Bitmap("b1", rng.choice([512, 4096, 1 << 16]), rng.random() < 0.5))
    before, after = list(data(size, cluster, rng)), list(data(size, cluster, rng))
    for operations in before, after:
        operations += clears(choice["ranges"], size, cluster, rng)
    if choice["compression"] != "none":
        first = list(compressed(size, cluster, rng))
        before = first + [operation for operation in before if apart(operation, first[0])]
        after = [operation for operation in after if apart(operation, first[0])]
    return Layer(choice, "qcow2", size, tuple(bitmaps), tuple(before), tuple(after))


def raw_plan(layer: Layer, rng: Random) -> Layer:
    operations = [
        *data(layer.size, 4096, rng),
        *clears(layer.choice["ranges"], layer.size, 4096, rng),
    ]
    return Layer(layer.choice, "raw", layer.size, (), tuple(operations), ())


def span(size: int, cluster: int, rng: Random) -> tuple[int, int]:
    """A range of sectors, now and then of whole clusters: four of these or 1 MiB at most."""
    longest = min(4 * cluster, 1 << 20, size)
    unit = cluster if cluster <= size // 2 and rng.random() < 0.4 else SECTOR
    length = rng.randrange(1, max(2, longest // unit + 1)) * unit
    offset = rng.randrange((size - min(length, size)) // unit + 1) * unit
    return offset, min(length, size - offset)


def few(size: int, cluster: int, rng: Random) -> range:
    """How many operations leave something of the layers below to be seen."""
    return range(rng.randrange(1, 2 + min(10, size // cluster // 8)))


def data(size: int, cluster: int, rng: Random) -> Iterator[str]:
    for _ in few(size, cluster, rng):
        offset, length = span(size, cluster, rng)
        yield f"write -q -P {rng.randrange(1, 256)} {offset} {length}"
    if rng.random() < 0.5:
        yield f"write -q -P 255 {size - SECTOR} {SECTOR}"


def compressed(size: int, cluster: int, rng: Random) -> Iterator[str]:
    """Whole clusters that nothing has been written to: text, and noise that does not shrink."""
    clusters = range(-(-size // cluster))
    source = "text"
    for index in rng.sample(clusters, min(len(clusters) // 4, rng.randrange(2, 16))):
        offset = index * cluster
        yield f"write -q -c -s {source} {offset} {min(cluster, size - offset)}"
        source = rng.choice(["text", "text", "noise"])


def apart(operation: str, other: str) -> bool:
    """Whether two commands touch different bytes: the first compressed cluster stays as it is."""
    (a, a_length), (b, b_length) = (map(int, text.split()[-2:]) for text in (operation, other))
    return a + a_length <= b or b + b_length <= a


def clears(ranges: str, size: int, cluster: int, rng: Random) -> Iterator[str]:
    for _ in few(size, cluster, rng):
        if ranges in ("zeroed", "both"):
            offset, length = span(size, cluster, rng)
            yield f"write -q -z{rng.choice(['', 'u'])} {offset} {length}"
        if ranges in ("discarded", "both"):
            offset, length = span(size, cluster, rng)
            yield f"discard -q {offset} {length}"


def build(chain: ChainPlan, directory: Path) -> Chain:
    """Make the images of a plan in an empty directory; raises AssertionError if a tool fails."""
    rng = Random(chain.id)
    (directory / "text").write_bytes(bytes(rng.choices(b"etaoin shrdlu\n", k=1 << 16)))
    (directory / "noise").write_bytes(rng.randbytes(1 << 16))
    built = list[Path]()
    for layer in chain.layers:
        built.append(directory / f"layer{len(built)}.{layer.format}")
        build_layer(layer, built)
    bitmaps = tuple(bitmap.name for bitmap in chain.layers[-1].bitmaps)
    return Chain(built[-1], tuple(built), bitmaps)


def build_layer(layer: Layer, built: list[Path]) -> None:
    """Everything runs in the images' folder, so that the names of backing files are relative.

    Those of data files are not: qemu looks for these from its own working directory.
    """
    *below, image = built
    folder, name = image.parent, image.name
    backing = ["-b", below[-1].name, "-F", below[-1].suffix[1:]] if below else []
    options = ["-o", qcow2_options(layer.choice, image)] if layer.format == "qcow2" else []
    create = ["create", "-q", "-f", layer.format, *options, *backing, name, str(layer.size)]
    peers.run("qemu-img", *create, cwd=folder)
    write(layer, layer.before, image)
    if layer.snapshot:
        peers.run("qemu-img", "snapshot", "-c", SNAPSHOT, name, cwd=folder)
    for bitmap in layer.bitmaps:
        add = ["bitmap", "--add", "-g", str(bitmap.granularity), name, bitmap.name]
        peers.run("qemu-img", *add, cwd=folder)
    write(layer, layer.after, image)
    for bitmap in layer.bitmaps:
        if not bitmap.enabled:
            peers.run("qemu-img", "bitmap", "--disable", name, bitmap.name, cwd=folder)


def write(layer: Layer, commands: tuple[str, ...], image: Path) -> None:
    if commands:
        line = [word for command in commands for word in ("-c", command)]
        peers.run("qemu-io", "-d", "unmap", "-f", layer.format, *line, image.name, cwd=image.parent)


def qcow2_options(choice: Choice, image: Path) -> str:
    options = [
        f"cluster_size={UNITS[choice['cluster']]}",
        f"compat={choice['version']}",
        f"extended_l2={choice['extended_l2']}",
    ]
    if choice["compression"] != "none":
        options.append(f"compression_type={choice['compression']}")
    if choice["data_file"] != "none":
        options.append(f"data_file={image.with_suffix('.data')}")
        options.append(f"data_file_raw={'on' if choice['data_file'] == 'data_file_raw' else 'off'}")
    return ",".join(options)


if __name__ == "__main__":
    chains = plan(*map(int, sys.argv[1:2]))
    print(f"{len(chains)} chains")
    print(coverage(chain.choice for chain in chains))
