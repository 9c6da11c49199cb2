"""The images that both servers get: those of the generator, of the soak's matrix, of the tests and
of `interop.damages`, and raw ones. Each can be made again and again, always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from interop import damages, generator, samples
from interop.damages import IMAGES as SOUND
from interop.generator import UNITS, ChainPlan
from interop.pairs import Value
from interop.soak import matrix
from interop.soak.matrix import Row
from tests.block.qcow2.images import IMAGES as SMALL

_FEATURES = {"v2": [("version", "v2")], "subclusters": [("compression", "zlib")]}
KINDS = ("chain", "matrix", "small", "raw", "damaged")


@dataclass(frozen=True)
class Subject:
    """An image: ``make`` writes it into an empty folder, and says where. Lengths are bytes.

    What is damaged of one lies in its first eight clusters.
    """

    name: str
    make: Callable[[Path], Path]
    cluster_size: int
    subcluster_size: int
    format: str = "qcow2"
    bitmaps: tuple[str, ...] = ()
    snapshot: str = ""
    damaged: bool = False
    features: frozenset[Value] = frozenset()

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def compressed(self) -> bool:
        """Whether some clusters are."""
        return any(name == "compression" and kind != "none" for name, kind in self.features)

    @property
    def version_2(self) -> bool:
        return bool(self.features & {("compat", "0.10"), ("version", "v2")})

    def __str__(self) -> str:
        return self.name


def subjects() -> list[Subject]:
    return [*chains(), *of_matrix(), *small(), *raw(), *damaged()]


def few(subjects: Iterable[Subject]) -> Iterator[Subject]:
    """Some of them, in which every feature is met."""
    pool = list(subjects)
    wanted = set[Value]().union(*(subject.features for subject in pool))
    while wanted:
        best = max(
            pool, key=lambda subject: (len(wanted & subject.features), -subject.cluster_size)
        )
        wanted -= best.features
        yield best


def chains() -> Iterator[Subject]:
    for plan in generator.plan():
        cluster, extended = UNITS[plan.choice["cluster"]], plan.choice["extended_l2"] == "on"
        yield Subject(
            f"chain {plan.id}",
            partial(_chain, plan),
            cluster,
            cluster // (32 if extended else 1),
            bitmaps=tuple(bitmap.name for bitmap in plan.layers[-1].bitmaps),
            snapshot=generator.SNAPSHOT if plan.layers[-1].snapshot else "",
            features=frozenset(plan.choice.items()),
        )


def _chain(plan: ChainPlan, folder: Path) -> Path:
    return generator.build(plan, folder).top


def of_matrix() -> Iterator[Subject]:
    for row in matrix.rows():
        yield Subject(
            f"matrix {row.name}",
            partial(_row, row),
            row.cluster_size,
            row.subcluster_size,
            bitmaps=tuple(name for name, _, _ in row.bitmaps),
            snapshot=matrix.SNAPSHOT if row.choice["snapshot"] == "yes" else "",
            features=frozenset(row.choice.items()),
        )


def _row(row: Row, folder: Path) -> Path:
    return matrix.build(row, folder / "image").path


def small() -> Iterator[Subject]:
    for name, make in SMALL.items():
        cluster = {"odd": 4 << 10, "large": 2 << 20}.get(name, 64 << 10)
        extended = name in ("extended", "subclusters", "extended-data-file")
        yield Subject(
            f"small {name}",
            make,
            cluster,
            cluster // (32 if extended else 1),
            features=frozenset(_FEATURES.get(name, ())),
            snapshot="s" if name in ("snapshot", "subclusters") else "",
        )


def raw() -> Iterator[Subject]:
    sizes = {"holes": 4 << 20, "blocks": (1 << 20) + (5 << 12), "sectors": (2 << 20) + 7 * 512}
    for name, size in {**sizes, "odd": (1 << 20) + 1003}.items():
        yield Subject(f"raw {name}", partial(_raw, size), 64 << 10, 4 << 10, "raw")


def _raw(size: int, folder: Path) -> Path:
    samples.sparse_file(folder / "disk.raw", size, seed=size)
    return folder / "disk.raw"


def damaged() -> Iterator[Subject]:
    for image, damage in damages.every_damage():
        sound = SOUND[image]
        cluster = 1 << sound.cluster_bits
        yield Subject(
            f"damaged {image}, {damage}",
            partial(damages.damaged, image, damage),
            cluster,
            cluster // (32 if sound.extended_l2 else 1),
            bitmaps=("recording",) if image == "bitmaps" else (),
            damaged=True,
        )
