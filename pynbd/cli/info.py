"""``pynbd info``: what an image is made of, or what a server offers.

JSON has the keys of ``qemu-img info --output=json`` for an image, those of ``nbdinfo --json
--list`` for a server; text is for people.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from pynbd.cli.completion import file_names
from pynbd.cli.export_info import server_info
from pynbd.cli.export_report import server_report
from pynbd.cli.image_info import Info, image_info
from pynbd.cli.image_report import report
from pynbd.cli.logs import told
from pynbd.cli.looking import (
    check_no_image_options,
    image_options,
    open_alone,
    open_disk,
)
from pynbd.cli.output import standard_output
from pynbd.errors import ImageError, PynbdError, UsageError
from pynbd.protocol.uri import is_uri


@click.command(
    short_help="Tell what an image is made of, or what a server exports.",
    epilog="""\b
Examples:
  pynbd info disk.qcow2
  pynbd info --force-share running.qcow2
  pynbd info --json --backing-chain disk.qcow2
  pynbd info nbd://localhost
  pynbd info --json 'nbd+unix:///?socket=/run/disk.sock'
""",
)
@click.argument("disk", metavar="IMAGE|URI", shell_complete=file_names)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (default: text).")
@click.option(
    "--backing-chain",
    is_flag=True,
    help="JSON: a list, with the images below too. Text always has them.",
)
@image_options
@told
def info(disk: str, as_json: bool, backing_chain: bool, **options: Any) -> None:
    """Tell about IMAGE: format, sizes, chain, features, snapshots, bitmaps; or about the exports of
    a server.
    """
    asyncio.run(_info(disk, as_json, backing_chain, options))


async def _info(disk: str, as_json: bool, backing_chain: bool, options: dict[str, Any]) -> None:
    if is_uri(disk):
        if backing_chain:
            raise UsageError("--backing-chain is for images: a server does not tell of its chain")
        check_no_image_options(options)
        server = await server_info(disk)
        with standard_output() as write:
            write(json.dumps(server, indent=4) + "\n" if as_json else server_report(disk, server))
        return
    chain, broken = await _images(disk, options)
    if broken and as_json and backing_chain:
        raise broken
    with standard_output() as write:
        if as_json:
            write(json.dumps(chain if backing_chain else chain[0], indent=4) + "\n")
            return
        write(report(chain))
    if broken:
        raise broken


async def _images(disk: str, options: dict[str, Any]) -> tuple[list[Info], ImageError | None]:
    """An image and those below it; it alone, and why, where these cannot be opened."""
    broken = None
    try:
        node = await open_disk(disk, **options)
    except ImageError as error:
        broken = error
        try:
            node = await open_alone(disk, **options)
        except PynbdError:
            raise error from None
    async with node:
        return [await image_info(layer) for layer in node.chain()], broken
