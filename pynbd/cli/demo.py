"""``python -m pynbd.cli.demo DIR``: a small family of images, a chain of three with a bitmap.

``make serve`` serves it. The path of the top image goes to standard output, what to type next to
standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pynbd.block.qcow2.builder import Bitmap, Cluster, Compressed, Data, Image, Zero

_CLUSTER = 1 << 16
_SIZE = 64 << 20

_NEXT = """\
A chain of three images was written: {directory}/monday, tuesday and wednesday.qcow2,
with the dirty bitmap "since-tuesday" in the last one. While it is served, in another terminal:

  nbdinfo nbd://localhost
  nbdinfo --map nbd://localhost
  nbdinfo --map=qemu:allocation-depth nbd://localhost
  nbdinfo --map=qemu:dirty-bitmap:since-tuesday nbd://localhost
  qemu-img convert -O raw nbd://localhost copy.raw

Ctrl-C ends it.
"""


def write_family(directory: Path) -> Path:
    """Write the three images into ``directory``, which is made; the path of the top one."""
    directory.mkdir(parents=True, exist_ok=True)

    def page(day: str, number: int) -> bytes:
        return f"{day}, page {number}\n".encode() * (_CLUSTER // 32)

    monday: dict[int, Cluster] = {}
    monday |= {n * _CLUSTER: Data(page("monday", n)) for n in range(64)}
    monday |= {n * _CLUSTER: Compressed(page("monday", n)) for n in range(64, 96)}
    Image(size=_SIZE, clusters=monday).write(directory / "monday.qcow2")
    Image(
        size=_SIZE,
        clusters={n * _CLUSTER: Data(page("tuesday", n)) for n in (*range(16, 24), 200)},
        backing_file="monday.qcow2",
        backing_format="qcow2",
    ).write(directory / "tuesday.qcow2")
    changed = range(20, 28)
    zeroed = range(40, 44)
    top = directory / "wednesday.qcow2"
    Image(
        size=_SIZE,
        clusters={n * _CLUSTER: Data(page("wednesday", n)) for n in changed}
        | {n * _CLUSTER: Zero() for n in zeroed},
        backing_file="tuesday.qcow2",
        backing_format="qcow2",
        bitmaps=[
            Bitmap(
                "since-tuesday",
                granularity=_CLUSTER,
                dirty=[(days[0] * _CLUSTER, len(days) * _CLUSTER) for days in (changed, zeroed)],
            )
        ],
    ).write(top)
    return top


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def demo(directory: Path) -> None:
    """Write the demo images into DIRECTORY."""
    top = write_family(directory)
    print(_NEXT.format(directory=directory), file=sys.stderr)
    print(top)


if __name__ == "__main__":
    demo()
