"""What the commands that look at a disk have in common: how the disk is named and opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from pynbd.block.chain import FORMATS, open_image
from pynbd.block.limits import ImageLimits
from pynbd.block.node import BlockNode
from pynbd.cli.image_limits import option_of, refusing_limit_options
from pynbd.errors import UsageError

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


untrusted_option = click.option(
    "--untrusted",
    is_flag=True,
    help="The image is from a stranger: nothing but regular files in its directory are opened for"
    " it, and no format is guessed (--format is needed).",
)


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of how an image is opened, in all commands the same; ``limits`` is one of what
    they become.
    """
    for option in (
        refusing_limit_options,
        untrusted_option,
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


def snapshot_option(help_text: str) -> Callable[[_Decorated], _Decorated]:
    """``--load-snapshot`` of the commands that read what is in a disk."""
    return click.option(
        "-l",
        "--load-snapshot",
        "snapshot",
        metavar="SNAP",
        help=f"{help_text} an internal snapshot: NAME, ID, snapshot.name=NAME or snapshot.id=ID.",
    )


async def open_disk(disk: str, **options: Any) -> BlockNode:
    """The image that an argument names, for reading; ``options`` are `image_options`."""
    if not disk:
        raise UsageError("the name of an image or an NBD URI is expected")
    return await open_image(disk, **options)


async def open_alone(disk: str, **options: Any) -> BlockNode:
    """The qcow2 image of a file, without those below it. `ImageError` if it is none."""
    alone = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": disk}}
    chosen = {name: options[name] for name in ("force_share", "format", "untrusted", "limits")}
    return await open_image(alone, **chosen)


def check_no_image_options(options: Mapping[str, object]) -> None:
    """Raise `UsageError` if any of `image_options` was given for a URI."""
    for name, value in options.items():
        if value:
            if isinstance(value, ImageLimits):
                option = option_of(value)
            else:
                option = "--load-snapshot" if name == "snapshot" else "--" + name.replace("_", "-")
            raise UsageError(f"{option} is for images: how an export is opened is the server's")
