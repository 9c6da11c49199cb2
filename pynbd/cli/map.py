"""``pynbd map``: which bytes of a disk are data, holes or zeroes, by which layer, dirty since when.

One context is printed as ``nbdinfo --map`` of libnbd prints it, to the byte; several are printed
side by side. ``--image`` draws the same for people.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from pynbd.cli.completion import file_names
from pynbd.cli.logs import told
from pynbd.cli.looking import (
    check_no_image_options,
    image_options,
    open_disk,
    snapshot_option,
)
from pynbd.cli.map_lines import JsonMap, TextMap, Totals
from pynbd.cli.map_rows import rows_of
from pynbd.cli.map_sources import (
    ExportSource,
    ImageSource,
    export_source,
    full_names,
)
from pynbd.cli.output import standard_output
from pynbd.cli.picture.drawing import draw, picture_of, renderer
from pynbd.errors import UsageError
from pynbd.protocol.uri import is_uri


@click.command(
    short_help="Print or draw what is data, hole, zero or dirty.",
    epilog="""\b
Examples:
  pynbd map disk.qcow2
  pynbd map --totals nbd://localhost
  pynbd map --context depth --context qemu:dirty-bitmap:monday disk.qcow2
  pynbd map --context base: --context qemu: --json disk.qcow2
  pynbd map -l before-upgrade disk.qcow2
  pynbd map --image disk.svg disk.qcow2
""",
)
@click.argument("disk", metavar="IMAGE|URI", shell_complete=file_names)
@click.option(
    "-c",
    "--context",
    "contexts",
    metavar="CTX",
    multiple=True,
    help="A metadata context: base:allocation, qemu:allocation-depth, qemu:dirty-bitmap:NAME; short"
    " are allocation and depth. A name that ends in a colon is all that begin so. Repeatable: a"
    " table (default: base:allocation).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (default: lines of text).")
@click.option("--totals", is_flag=True, help="Print the sums of each status, not each extent.")
@click.option(
    "--image",
    "picture",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw the layers and bitmaps of an image: FILE.svg or FILE.png.",
)
@snapshot_option("Look at")
@image_options
@told
def map(  # noqa: A001 (the name of the command)
    disk: str,
    contexts: tuple[str, ...],
    as_json: bool,
    totals: bool,
    picture: Path | None,
    **options: Any,
) -> None:
    """Print what each range of IMAGE or of an export is: data, hole, zero; whose; dirty."""
    wanted = full_names(contexts)
    if picture is not None:
        if as_json or totals or contexts:
            raise UsageError("--image draws all there is: without --context, --json and --totals")
        if is_uri(disk):
            raise UsageError("--image draws images: a server does not tell of its layers")
        renderer(picture)  # refuses what cannot be drawn before the disk is looked over
    asyncio.run(_map(disk, wanted, as_json, totals, picture, options))


async def _map(
    disk: str,
    contexts: list[str],
    as_json: bool,
    totals: bool,
    picture: Path | None,
    options: dict[str, Any],
) -> None:
    if is_uri(disk):
        check_no_image_options(options)
        async with export_source(disk, contexts) as source:
            await _print(source, as_json, totals)
        return
    async with await open_disk(disk, **options) as node:
        if picture is not None:
            draw(await picture_of(node, node.bitmaps()), picture)
        else:
            await _print(ImageSource(node, contexts), as_json, totals)


async def _print(source: ImageSource | ExportSource, as_json: bool, totals: bool) -> None:
    with standard_output() as write:
        if totals:
            sums = Totals(source.contexts, source.size)
            async for rows in rows_of(source, source.contexts):
                sums.add(rows)
            write(sums.json() if as_json else sums.text())
            return
        shape = JsonMap(source.contexts) if as_json else TextMap(source.contexts, source.size)
        write(shape.head())
        async for rows in rows_of(source, source.contexts):
            write(shape.lines(rows))
        write(shape.foot())
