"""``pynbd copy``: a disk, or what is dirty of it, from an image or a URI onto another."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import click

from pynbd.block.chain import FORMATS
from pynbd.block.limits import ImageLimits
from pynbd.cli.completion import file_names
from pynbd.cli.creation_options import backing_options, options_option, with_named_options
from pynbd.cli.logs import told
from pynbd.cli.looking import check_no_image_options, image_options, snapshot_option
from pynbd.cli.numbers import power_of_two
from pynbd.cli.progress import progress_bar
from pynbd.cli.transfer import Interrupted, check_name, run, transfer_options
from pynbd.client.copy import copy as copy_disk
from pynbd.client.dirty import dirty_ranges
from pynbd.client.ends import Reading, Writing, open_disk, open_target
from pynbd.errors import UsageError
from pynbd.protocol.uri import is_uri

_OTHER_FORMATS = frozenset({".qcow", ".qed", ".vdi", ".vhd", ".vhdx", ".vmdk"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """What `copy` was asked for; the names are those of its options."""

    source: str
    target: str
    format: str | None
    probe_backing: bool
    force_share: bool
    untrusted: bool
    limits: ImageLimits | None
    snapshot: str | None
    target_format: str | None
    no_create: bool
    creation: dict[str, Any]
    bitmap: str | None
    sparse: int
    allocated: bool
    target_is_zero: bool
    connections: int
    requests: int
    request_size: int
    progress: bool | None


def _one_bitmap(
    _context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]
) -> str | None:
    """Of two, one alone would miss what is dirty in the other."""
    if len(names) > 1:
        raise UsageError("--bitmap: one at a time")
    return names[0] if names else None


@click.command(
    short_help="Copy a disk, or what is dirty of it.",
    epilog="""\b
Examples:
  pynbd copy disk.qcow2 disk.raw
  pynbd copy -o extended_l2=on disk.raw new.qcow2
  pynbd copy -B base.qcow2 -F qcow2 nbd://localhost/disk overlay.qcow2
  pynbd copy nbd://backup.example/disk disk.raw
  pynbd copy disk.raw 'nbd+unix:///?socket=/run/disk.sock'
  pynbd copy --bitmap monday disk.qcow2 copy-of-monday.raw
""",
)
@click.argument("source", metavar="SRC", shell_complete=file_names)
@click.argument("target", metavar="DST", shell_complete=file_names)
@image_options
@snapshot_option("Copy")
@click.option(
    "-O",
    "--target-format",
    type=click.Choice(FORMATS),
    help="The format of a DST that is a file (default: for a new one qcow2, if its name ends so,"
    " else raw; for one that is there raw, but none is overwritten that looks like another"
    " format).",
)
@click.option(
    "-n",
    "--no-create",
    is_flag=True,
    help="Write into the image DST that is there, and keep what is beyond the end of SRC (default:"
    " it begins anew).",
)
@options_option
@backing_options("-B", "Make DST an overlay of this file, with what differs from it")
@click.option(
    "--bitmap",
    metavar="NAME",
    multiple=True,
    callback=_one_bitmap,
    help="Copy only what is dirty in this bitmap, onto an earlier copy that is there. A bitmap that"
    " does not record (pynbd info) misses what was written since it did.",
)
@click.option(
    "-S",
    "--sparse",
    metavar="SIZE",
    type=power_of_two(512, 32 << 20, or_none=True),
    default="4k",
    show_default=True,
    help="So many zero bytes of data, a power of two, become a hole; 0 looks for none.",
)
@click.option("--allocated", is_flag=True, help="Make no holes: zeroes take up space in DST.")
@click.option(
    "--target-is-zero",
    "--destination-is-zero",
    is_flag=True,
    help="DST reads as zeroes already, so that none are written. A new file is known to.",
)
@click.option("--flush", is_flag=True, help="Always done: in the end all is on stable storage.")
@transfer_options
@told
def copy(
    flush: bool,
    texts: dict[str, Any],
    backing_file: str | None,
    backing_fmt: str | None,
    **options: Any,  # the other options are CopyOptions, name by name
) -> None:
    """Copy the disk SRC onto DST; each is an image or an NBD URI.

    A file is made, or replaced by an image of the size of SRC; a new one is removed if the copy
    fails. A block device or an export has to be large enough, and keeps what lies beyond.
    """
    named = {"backing_file": backing_file, "backing_fmt": backing_fmt}
    wanted = CopyOptions(creation=with_named_options(texts, named), **options)
    _check(wanted)
    run(_copy(wanted))


def _check(wanted: CopyOptions) -> None:
    check_name("SRC", wanted.source)
    check_name("DST", wanted.target)
    if is_uri(wanted.source):
        check_no_image_options(
            {
                name: getattr(wanted, name)
                for name in (
                    "format",
                    "probe_backing",
                    "force_share",
                    "untrusted",
                    "limits",
                    "snapshot",
                )
            }
        )
    if is_uri(wanted.target):
        for option, given in (
            ("--target-format", wanted.target_format),
            ("--no-create", wanted.no_create),
            (_option_of(wanted.creation), wanted.creation),
        ):
            if given:
                raise UsageError(f"{option} is for files: DST is a URI")
    elif ":" in wanted.target.partition("/")[0] and not os.path.lexists(wanted.target):
        raise UsageError(f"DST: {wanted.target!r} is a protocol name, neither a file nor a URI")
    suffix = os.path.splitext(wanted.target)[1]
    is_new = not (is_uri(wanted.target) or os.path.lexists(wanted.target))
    if suffix in _OTHER_FORMATS and is_new and wanted.target_format is None:
        raise UsageError(
            f"DST: {wanted.target} would be raw, whatever its name says (-O raw makes it so)"
        )
    if wanted.creation:
        _check_creation(wanted, is_new=is_new)
    if wanted.bitmap is not None and wanted.snapshot is not None:
        raise UsageError("--bitmap: bitmaps describe the active state, not a snapshot (-l)")
    if wanted.bitmap is not None and wanted.target_is_zero:
        raise UsageError("--target-is-zero: with --bitmap DST is an earlier copy, not zeroes")


def _check_creation(wanted: CopyOptions, *, is_new: bool) -> None:
    """Options of a new qcow2 image are for that."""
    option = _option_of(wanted.creation)
    is_qcow2 = wanted.target_format == "qcow2" or (
        wanted.target_format is None and is_new and wanted.target.endswith(".qcow2")
    )
    if wanted.no_create or wanted.bitmap is not None:
        other = "--no-create" if wanted.no_create else "--bitmap"
        raise UsageError(f"{option}: with {other} no image is made")
    if not is_qcow2:
        raise UsageError(f"{option}: it is for a new qcow2 image (-O qcow2 makes DST one)")
    if "size" in wanted.creation:
        raise UsageError("-o size: a copy is as large as SRC")
    if "backing_file" in wanted.creation and wanted.target_is_zero:
        raise UsageError("--target-is-zero: with --backing DST reads as that file, not as zeroes")


def _option_of(creation: dict[str, Any]) -> str:
    return "--backing" if "backing_file" in creation else "-o"


async def _copy(wanted: CopyOptions) -> None:
    reading = Reading(
        format=wanted.format,
        snapshot=wanted.snapshot,
        force_share=wanted.force_share,
        probe_backing=wanted.probe_backing,
        untrusted=wanted.untrusted,
        limits=wanted.limits,
        bitmap=wanted.bitmap,
        connections=wanted.connections,
    )
    writing = Writing(
        format=wanted.target_format,
        creation=wanted.creation,
        existing=wanted.no_create,
        reads_zero=wanted.target_is_zero,
        sparse=wanted.sparse,
        allocated=wanted.allocated,
        connections=wanted.connections,
    )
    async with open_disk(wanted.source, reading) as source:
        ranges = await dirty_ranges(source, wanted.bitmap) if wanted.bitmap is not None else None
        async with open_target(wanted.target, source, writing, whole=ranges is None) as target:
            try:
                with progress_bar(wanted.progress, source.size) as progress:
                    await copy_disk(
                        source,
                        target,
                        ranges=ranges,
                        requests=wanted.requests,
                        request_size=wanted.request_size,
                        progress=progress,
                    )
            except asyncio.CancelledError:
                left = "" if target.is_new else f"; {wanted.target} is incomplete now"
                raise Interrupted(f"interrupted{left}") from None
