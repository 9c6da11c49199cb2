"""``pynbd demo DIR``: a small family of images, a chain of three with a bitmap.

The path of the top image goes to standard output, what to type next to standard error. A family
that is there already is left as it is: it may be being served.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from pynbd.block.qcow2.builder import Bitmap, Cluster, Compressed, Data, Image, Zero
from pynbd.cli.output import printable, standard_output
from pynbd.errors import PynbdError

_CLUSTER = 1 << 16
_SIZE = 64 << 20

_NEXT = """\
There is a chain of three images, {directory}/monday, tuesday and wednesday.qcow2,
with the dirty bitmap "since-tuesday" in the last one. To look at it:

  pynbd info {directory}/wednesday.qcow2
  pynbd map {directory}/wednesday.qcow2
  pynbd map --image disk.svg {directory}/wednesday.qcow2

While it is served (pynbd serve {directory}/wednesday.qcow2), in another terminal:

  nbdinfo nbd://localhost
  nbdinfo --map nbd://localhost
  nbdinfo --map=qemu:allocation-depth nbd://localhost
  nbdinfo --map=qemu:dirty-bitmap:since-tuesday nbd://localhost
  qemu-img convert -O raw nbd://localhost copy.raw
"""


def write_family(directory: Path) -> Path:
    """Write the three images into ``directory``, which is made; the path of the top one.

    They come to it all at once; where a family is, nothing is written. Raises `PynbdError` for a
    directory with anything else in it.
    """
    top = directory / "wednesday.qcow2"
    if top.exists() and (directory / "tuesday.qcow2").exists():
        return top
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PynbdError(f"{directory}: it is there, and is no empty directory")
    unfinished = directory.with_name(f"{directory.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise PynbdError(f"{directory}: it cannot be made: {error.strerror}") from None
    try:
        _write_images(unfinished)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return top


def _write_images(directory: Path) -> None:
    def page(day: str, number: int) -> bytes:
        return f"{day}, page {number}\n".encode() * (_CLUSTER // 32)

    monday: dict[int, Cluster] = {}
    monday |= {n * _CLUSTER: Data(page("monday", n)) for n in range(64)}
    monday |= {n * _CLUSTER: Compressed(page("monday", n)) for n in range(64, 96)}
    Image(size=_SIZE, clusters=monday).write(directory / "monday.qcow2")
    tuesday = Image(
        size=_SIZE,
        clusters={n * _CLUSTER: Data(page("tuesday", n)) for n in (*range(16, 24), 200)},
        backing_file="monday.qcow2",
        backing_format="qcow2",
    )
    tuesday.write(directory / "tuesday.qcow2")
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
    wednesday.write(directory / "wednesday.qcow2")


@click.command(
    short_help="Write a few small images to try things with.",
    epilog="""\b
Examples:
  pynbd demo family
  pynbd map family/wednesday.qcow2
  pynbd serve family/wednesday.qcow2
""",
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
