"""What the commands that look at a disk have in common: how the disk is named and opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from pynbd.block.chain import FORMATS, open_image
from pynbd.block.node import BlockNode
from pynbd.errors import UsageError


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of how an image is opened, in all commands the same; see `Opening`."""
    for option in (
        click.option(
            "--probe-backing",
            is_flag=True,
            help="Guess the format of backing files that have none recorded.",
        ),
        click.option(
            "-U",
            "--force-share",
            is_flag=True,
            help="Look at an image that another process may be writing.",
        ),
        click.option(
            "-f",
            "--format",
            type=click.Choice(FORMATS),
            help="The format of the image (default: told by its first bytes).",
        ),
    ):
        command = option(command)
    return command


async def open_disk(disk: str, **options: Any) -> BlockNode:
    """The image that an argument names, for reading; ``options`` are `image_options`."""
    if not disk:
        raise UsageError("the name of an image or an NBD URI is expected")
    return await open_image(disk, **options)


async def open_alone(disk: str, **options: Any) -> BlockNode:
    """The qcow2 image of a file, without those below it. `ImageError` if it is none."""
    alone = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": disk}}
    return await open_image(alone, force_share=options["force_share"], format=options["format"])


def check_no_image_options(options: Mapping[str, object]) -> None:
    """Raise `UsageError` if any of `image_options` was given for a URI."""
    for name, value in options.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is for images: how an export is opened is the server's")
