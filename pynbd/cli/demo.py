"""``pynbd demo DIR``: a small family of images, a chain of three with a bitmap.

The path of the top image goes to standard output, what to type next to standard error. A family
that is there already is left as it is: it may be being served.
"""

from __future__ import annotations

from pathlib import Path

import click

from pynbd.block.qcow2.builder import Bitmap, Cluster, Compressed, Data, Image, Zero
from pynbd.cli.output import printable, standard_output

_CLUSTER = 1 << 16
_SIZE = 64 << 20

_NEXT = """\
There is a chain of three images, {directory}/monday, tuesday and wednesday.qcow2,
with the dirty bitmap "since-tuesday" in the last one. While it is served with the default
port, in another terminal:

  nbdinfo nbd://localhost
  nbdinfo --map nbd://localhost
  nbdinfo --map=qemu:allocation-depth nbd://localhost
  nbdinfo --map=qemu:dirty-bitmap:since-tuesday nbd://localhost
  qemu-img convert -O raw nbd://localhost copy.raw

Ctrl-C ends it.
"""


def write_family(directory: Path) -> Path:
    """Write the three images into ``directory``, which is made; the path of the top one.

    Each comes whole to its name, and the top one last: where that is, nothing is written.
    """
    top = directory / "wednesday.qcow2"
    if top.exists():
        return top
    directory.mkdir(parents=True, exist_ok=True)

    def page(day: str, number: int) -> bytes:
        return f"{day}, page {number}\n".encode() * (_CLUSTER // 32)

    def write(image: Image, path: Path) -> None:
        unfinished = path.with_suffix(".new")
        image.write(unfinished)
        unfinished.rename(path)

    monday: dict[int, Cluster] = {}
    monday |= {n * _CLUSTER: Data(page("monday", n)) for n in range(64)}
    monday |= {n * _CLUSTER: Compressed(page("monday", n)) for n in range(64, 96)}
    write(Image(size=_SIZE, clusters=monday), directory / "monday.qcow2")
    tuesday = Image(
        size=_SIZE,
        clusters={n * _CLUSTER: Data(page("tuesday", n)) for n in (*range(16, 24), 200)},
        backing_file="monday.qcow2",
        backing_format="qcow2",
    )
    write(tuesday, directory / "tuesday.qcow2")
    changed = range(20, 28)
    zeroed = range(40, 44)
    wednesday = Image(
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
    )
    write(wednesday, top)
    return top


@click.command(
    epilog="""\b
Examples:
  pynbd demo family
  pynbd map family/wednesday.qcow2
  pynbd serve family/wednesday.qcow2
"""
)
@click.argument("directory", type=click.Path(path_type=Path))
def demo(directory: Path) -> None:
    """Write a family of small images into DIRECTORY, to try things with.

    They are a chain of three: monday, tuesday and wednesday.qcow2, with data, zeroes, compressed
    clusters and a dirty bitmap. The path of the last one is printed.
    """
    top = write_family(directory)
    click.echo(_NEXT.format(directory=printable(str(directory))), err=True)
    with standard_output() as write:
        write(f"{top}\n")
