"""``pynbd compare``: whether two disks have the same contents, with the statuses of ``qemu-img
compare``.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import click

from pynbd.block.chain import FORMATS
from pynbd.block.limits import ImageLimits
from pynbd.cli.complaints import complain, said_of
from pynbd.cli.completion import file_names
from pynbd.cli.logs import told
from pynbd.cli.looking import check_no_image_options, image_options, snapshot_option
from pynbd.cli.output import standard_output
from pynbd.cli.progress import progress_bar
from pynbd.cli.transfer import Interrupted, check_name, run, transfer_options
from pynbd.client.compare import Comparison, Difference
from pynbd.client.compare import compare as compare_disks
from pynbd.client.disk import Disk
from pynbd.client.ends import Reading, open_disk
from pynbd.errors import MapError, PynbdError, ReadError
from pynbd.protocol.uri import is_uri

_DIFFERENT, _CANNOT_OPEN, _CANNOT_MAP, _CANNOT_READ = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What `compare` was asked for; the names are those of its options."""

    a: str
    b: str
    format: str | None
    b_format: str | None
    snapshot: str | None
    probe_backing: bool
    force_share: bool
    untrusted: bool
    limits: ImageLimits | None
    strict: bool
    every: bool
    as_json: bool
    quiet: bool
    connections: int
    requests: int
    request_size: int
    progress: bool | None


@click.command(
    short_help="Tell whether two disks are the same.",
    epilog="""\b
Exit status, as of qemu-img compare:
  0  they are identical
  1  they differ
  2  one of them cannot be opened, or the arguments make no sense
  3  one of them cannot tell where it has data
  4  one of them cannot be read

\b
Examples:
  pynbd compare disk.qcow2 disk.raw
  pynbd compare --all nbd://localhost/before nbd://localhost/after
  pynbd compare -l before-upgrade disk.qcow2 disk.qcow2
  pynbd compare --json --strict disk.qcow2 copy.qcow2
""",
)
@click.argument("a", shell_complete=file_names)
@click.argument("b", shell_complete=file_names)
@image_options
@click.option(
    "-F",
    "--b-format",
    type=click.Choice(FORMATS),
    help="The format of B; --format is that of A (default: told by its first bytes).",
)
@snapshot_option("Let A be")
@click.option(
    "-s",
    "--strict",
    is_flag=True,
    help="Different sizes are a difference, and so is what is data in one, and in the other zeroes"
    " or not there.",
)
@click.option("--all", "every", is_flag=True, help="List all that differs (default: the first).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (default: text).")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@transfer_options
@told
def compare(**options: Any) -> int:  # the options are CompareOptions, name by name
    """Compare what guests see of the disks A and B; each is an image or an NBD URI.

    If one is longer, what lies beyond the end of the other has to be zeroes.
    """
    wanted = CompareOptions(**options)
    check_name("A", wanted.a)
    check_name("B", wanted.b)
    if is_uri(wanted.a):
        check_no_image_options({"format": wanted.format, "snapshot": wanted.snapshot})
    if is_uri(wanted.b):
        check_no_image_options({"b_format": wanted.b_format})
    if is_uri(wanted.a) and is_uri(wanted.b):
        check_no_image_options(
            {
                name: getattr(wanted, name)
                for name in ("probe_backing", "force_share", "untrusted", "limits")
            }
        )
    try:
        return run(_compare(wanted))
    except (PynbdError, OSError) as error:
        complain("pynbd", said_of(error), _status(error))


def _status(error: Exception) -> int:
    if isinstance(error, MapError):
        return _CANNOT_MAP
    return _CANNOT_READ if isinstance(error, ReadError) else _CANNOT_OPEN


async def _compare(wanted: CompareOptions) -> int:
    async with (
        open_disk(wanted.a, _reading(wanted, wanted.format, wanted.snapshot)) as a,
        open_disk(wanted.b, _reading(wanted, wanted.b_format)) as b,
    ):
        try:
            with progress_bar(wanted.progress, max(a.size, b.size)) as progress:
                result = await compare_disks(
                    a,
                    b,
                    strict=wanted.strict,
                    every=wanted.every,
                    requests=wanted.requests,
                    request_size=wanted.request_size,
                    progress=progress,
                )
        except asyncio.CancelledError:
            raise Interrupted("interrupted") from None
        if not wanted.quiet:
            with standard_output() as write:
                write(_json(a, b, result) if wanted.as_json else _text(a, b, result))
    return _DIFFERENT if result.difference else 0


def _reading(
    wanted: CompareOptions, format_name: str | None, snapshot: str | None = None
) -> Reading:
    return Reading(
        format=format_name,
        snapshot=snapshot,
        probe_backing=wanted.probe_backing,
        force_share=wanted.force_share,
        untrusted=wanted.untrusted,
        limits=wanted.limits,
        connections=wanted.connections,
    )


def _text(a: Disk, b: Disk, result: Comparison) -> str:
    lines = []
    if a.size != b.size and result.difference is not Difference.SIZE:
        lines.append(
            f"The sizes differ: A has {a.size} bytes, B {b.size}; beyond the shorter one zeroes are"
            " expected."
        )
    lines += {
        None: ["Images are identical."],
        Difference.SIZE: [f"The sizes differ: A has {a.size} bytes, B {b.size}."],
        Difference.ALLOCATION: [f"The allocation differs at offset {result.offset}."],
        Difference.CONTENT: [f"The contents differ at offset {result.offset}."],
    }[result.difference]
    lines += [f"{start:>16} {end - start:>16}" for start, end in result.ranges or ()]
    return "".join(f"{line}\n" for line in lines)


def _json(a: Disk, b: Disk, result: Comparison) -> str:
    told: dict[str, object] = {
        "identical": result.difference is None,
        "sizes": [a.size, b.size],
    }
    if result.difference:
        told |= {"difference": result.difference, "offset": result.offset}
    if result.ranges is not None:
        told["ranges"] = [{"offset": start, "length": end - start} for start, end in result.ranges]
    return json.dumps(told, indent=2) + "\n"
