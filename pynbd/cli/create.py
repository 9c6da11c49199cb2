"""``pynbd create``: a new image; its options are those of ``qemu-img create``."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import click

from pynbd.block.chain import FORMATS
from pynbd.block.creation import create_image
from pynbd.block.new_file import Preallocation
from pynbd.block.qcow2.create import NewImage
from pynbd.block.qcow2.format import CompressionType
from pynbd.cli.completion import file_names
from pynbd.cli.creation_options import TYPES, backing_options, options_option, with_named_options
from pynbd.cli.output import in_units, printable, standard_output
from pynbd.cli.transfer import run
from pynbd.errors import UsageError


@click.command(
    short_help="Make a new image, qcow2 or raw.",
    epilog="""\b
Examples:
  pynbd create disk.qcow2 20G
  pynbd create -b base.qcow2 -F qcow2 overlay.qcow2
  pynbd create --extended-l2 --cluster-size 128k --compression zstd disk.qcow2 1T
  pynbd create -o preallocation=metadata,lazy_refcounts=on disk.qcow2 20G
  pynbd create -f raw --preallocation falloc disk.raw 20G
""",
)
@click.argument("path", metavar="FILE", shell_complete=file_names)
@click.argument("size", required=False, type=TYPES["size"])
@click.option(
    "-f",
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    default="qcow2",
    show_default=True,
    help="The format of the image.",
)
@backing_options("-b", "What it is an overlay of")
@click.option(
    "-u",
    "--backing-unsafe",
    "backing_unchecked",
    is_flag=True,
    help="Do not open the backing file: it may be missing; SIZE is needed then.",
)
@click.option(
    "--cluster-size",
    metavar="SIZE",
    type=TYPES["cluster_size"],
    help="A power of two, 512 to 2M (default: 64k).",
)
@click.option(
    "--extended-l2",
    is_flag=True,
    default=None,
    help="Allocate the 32nd part of a cluster at a time; clusters of 16k or more (default: off).",
)
@click.option(
    "--compression",
    "compression_type",
    type=click.Choice(list(map(str, CompressionType))),
    help="How clusters that are written compressed are (default: zlib).",
)
@click.option(
    "--refcount-bits",
    metavar="NUM",
    type=TYPES["refcount_bits"],
    help="The width of reference counts, a power of two, 1 to 64 (default: 16).",
)
@click.option(
    "--lazy-refcounts",
    is_flag=True,
    default=None,
    help="Write reference counts late; after a crash they are counted anew (default: off).",
)
@click.option(
    "--compat",
    type=click.Choice(["0.10", "1.1", "v2", "v3"]),
    help="The version of the format; 0.10, which is v2, has none of the options above but the"
    " cluster size (default: 1.1).",
)
@click.option(
    "--preallocation",
    type=click.Choice(list(map(str, Preallocation))),
    help="What is there from the beginning: the tables (metadata), and the space, allocated"
    " (falloc) or written (full) (default: off).",
)
@click.option(
    "--data-file",
    metavar="FILE",
    shell_complete=file_names,
    help="Keep guest data in this file, which is made, too; a relative name is looked for in the"
    " current directory, as QEMU does (default: none).",
)
@click.option(
    "--raw-data-file",
    "data_file_raw",
    is_flag=True,
    default=None,
    help="Keep the data file readable as a raw image (default: off).",
)
@options_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def create(
    path: str,
    texts: dict[str, Any],
    format_name: str,
    backing_unchecked: bool,
    quiet: bool,
    **named: Any,
) -> None:
    """Make FILE an image of SIZE bytes (k, M, G, T, P or E may follow), over whatever is there.

    Nobody may have FILE open. Without SIZE it is as large as its backing file.
    """
    if not path or (":" in path.partition("/")[0] and not os.path.lexists(path)):
        raise UsageError(f"FILE: {path!r} is not the name of a file")
    options = with_named_options(texts, named)
    new = run(
        create_image(path, format=format_name, backing_unchecked=backing_unchecked, **options)
    )
    if not quiet:
        with standard_output() as write:
            write(f"{printable(path)}: {_told(new, format_name)}\n")


def _told(new: NewImage, format_name: str) -> str:
    """What was made, with the options that are not those by default."""
    told = [format_name, f"{in_units(new.size)} ({new.size} bytes)"]
    for field in fields(new):
        value = getattr(new, field.name)
        if field.name != "size" and value != field.default:
            shown = "on" if value is True else printable(str(value))
            told.append(f"{field.name}={shown}")
    return ", ".join(told)
