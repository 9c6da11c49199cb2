"""``pynbd check``: whether the metadata of an image is right, and its repair.

JSON has the keys of ``qemu-img check --output=json`` (`ImageCheck` of QEMU's
qapi/block-core.json), the exit status is that of ``qemu-img check``. What was found goes to
standard error, a line for each place; that the image is marked dirty or corrupt, too, for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing

import click

from pynbd.block.chain import FORMATS, check_untrusted
from pynbd.block.confinement import Confinement
from pynbd.block.engine import Engine
from pynbd.block.file import open_host_file
from pynbd.block.new_file import open_to_write
from pynbd.block.probe import PROBE_LENGTH, probe_format
from pynbd.block.qcow2.check import check as check_image
from pynbd.block.qcow2.format import Incompatible
from pynbd.block.qcow2.image import read_header
from pynbd.block.qcow2.repair import Fix, repair
from pynbd.block.qcow2.report import Report
from pynbd.cli.complaints import complain
from pynbd.cli.completion import file_names
from pynbd.cli.logs import configure
from pynbd.cli.looking import untrusted_option
from pynbd.cli.numbers import counted
from pynbd.cli.output import printable, standard_output
from pynbd.cli.transfer import run
from pynbd.errors import ImageError, UsageError
from pynbd.protocol.uri import is_uri

_NOT_CHECKED, _CORRUPT, _LEAKS, _NO_CHECK = 1, 2, 3, 63

_HUMAN, _JSON = "human", "json"

# Of QEMU's keys those that are there only if they have something to say.
_KEYS = (
    "image-end-offset",
    "corruptions",
    "leaks",
    "corruptions-fixed",
    "leaks-fixed",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)

# What is told of an image that has the mark, and of one from which a repair has cleared it.
_MARKS = (
    (
        Incompatible.DIRTY,
        (
            "it was not closed properly: its refcounts are out of date, which opening it for"
            " writing, or -r all, mends"
        ),
        "it was not closed properly: it was marked dirty, and is not any more",
    ),
    (
        Incompatible.CORRUPT,
        "it is marked corrupt: it is not opened for writing before -r all has cleared that",
        "it was marked corrupt, and is not any more",
    ),
)


class _NoCheck(Exception):
    """There is nothing to check in images of this format."""


@click.command(
    short_help="Check the metadata of an image, or repair it.",
    epilog="""\b
Exit status:
  0   nothing is wrong (any more)
  1   the image could not be checked, or not all of it
  2   there are corruptions: data are in danger; or arguments that make no sense
  3   there are leaks only: space is lost, and nothing else
  63  the format has no metadata to be checked (raw)

\b
Examples:
  pynbd check disk.qcow2
  pynbd check --json disk.qcow2
  pynbd check -r leaks disk.qcow2
  pynbd check -q -r all disk.qcow2 && pynbd serve disk.qcow2
""",
)
@click.argument("image", shell_complete=file_names)
@click.option(
    "-r",
    "--repair",
    "fix",
    type=click.Choice([fix.value for fix in Fix]),
    help="Free lost space, or mend all that can be mended (default: the image is only read).",
)
@click.option(
    "-f",
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    help="The format of the image (default: told by its first bytes).",
)
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="Check an image that another process may be writing; what is found may be its work.",
)
@untrusted_option
@click.option(
    "--output",
    type=click.Choice([_HUMAN, _JSON]),
    default=_HUMAN,
    show_default=True,
    help="How the result is printed.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --output=json.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors: the status tells.")
def check(
    image: str,
    fix: str | None,
    format_name: str | None,
    force_share: bool,
    untrusted: bool,
    output: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check IMAGE: whether each host cluster is in use as often as its refcount says, and the
    tables obey the rules of qcow2.

    Images below it are not looked at. Nobody else may write it meanwhile; for a repair, nobody may
    use it.
    """
    if not image or is_uri(image):
        raise UsageError(f"IMAGE: {image!r} is not the name of a file")
    if fix and force_share:
        raise UsageError("--repair excludes --force-share: nobody else may use the image meanwhile")
    if untrusted:
        check_untrusted(image, format_name)
    wanted = Fix(fix) if fix else None
    configure(verbose=False, trace=False, log_format="text")
    try:
        report, marks, left = run(
            _check(image, format_name, wanted, force_share=force_share, untrusted=untrusted)
        )
    except _NoCheck as error:
        complain("pynbd", str(error), _NO_CHECK)
    if not quiet:
        for line in report.findings:
            click.echo(f"{printable(image)}: {printable(line)}", err=True)
        if not as_json and output != _JSON:
            for line in _told_of_marks(marks, left):
                click.echo(f"{printable(image)}: {line}", err=True)
        with standard_output() as write:
            write(_json(image, report) if as_json or output == _JSON else _text(report))
    if report.check_errors:
        complain("pynbd", f"{image}: not all of it could be checked", _NOT_CHECKED)
    if report.corruptions:
        return _CORRUPT
    return _LEAKS if report.leaks else 0


async def _check(
    image: str, format_name: str | None, fix: Fix | None, *, force_share: bool, untrusted: bool
) -> tuple[Report, Incompatible, Incompatible]:
    """The report, and the marks of the image before and afterwards."""
    opener = Confinement().open if untrusted else None
    with ExitStack() as open_ones:
        engine = open_ones.enter_context(closing(Engine()))
        file = (
            open_host_file(engine, image, writable=False, force_share=force_share, opener=opener)
            if fix is None
            else open_to_write(engine, image, opener=opener)
        )
        open_ones.enter_context(closing(file))
        looks_like = probe_format(await file.read_bytes(PROBE_LENGTH, 0))
        if (format_name or looks_like) != "qcow2":
            name = format_name or looks_like
            raise _NoCheck(f"{image}: its format is {name}, of which there is no check")
        if looks_like != "qcow2":
            raise ImageError(f"{image}: it is not a qcow2 image; it looks like {looks_like}")
        header = await read_header(file)
        marks = header.incompatible
        if fix is None:
            return await check_image(file, header), marks, marks
        report = await repair(file, header, fix=fix)
        return report, marks, (await read_header(file)).incompatible


def _told_of_marks(marks: Incompatible, left: Incompatible) -> Iterator[str]:
    for mark, found, cleared in _MARKS:
        if mark in marks:
            yield found if mark in left else cleared


def _json(image: str, report: Report) -> str:
    told: dict[str, object] = {"filename": image, "format": "qcow2"}
    told["check-errors"] = report.check_errors
    for key in _KEYS:
        if number := getattr(report, key.replace("-", "_")):
            told[key] = number
    return json.dumps(told, indent=4) + "\n"


def _text(report: Report) -> str:
    lines = []
    if report.leaks_fixed or report.corruptions_fixed:
        lines.append(
            f"Repaired: {counted(report.leaks_fixed, 'leaked cluster')},"
            f" {counted(report.corruptions_fixed, 'error')}."
        )
    if report.clean:
        lines.append("No errors were found on the image.")
    if report.corruptions:
        lines.append(
            f"{_were_found(report.corruptions, 'error')}: what it holds may be damaged, and writing"
            " to it may damage more."
        )
    if report.leaks:
        lines.append(
            f"{_were_found(report.leaks, 'leaked cluster')}: lost space, which does no harm."
        )
    if report.check_errors:
        lines.append(
            f"{counted(report.check_errors, 'time')} the check could not look at something."
        )
    if report.total_clusters and report.allocated_clusters:
        share = 100 / report.allocated_clusters
        lines.append(
            f"{report.allocated_clusters}/{report.total_clusters} ="
            f" {report.allocated_clusters * 100 / report.total_clusters:.2f}% allocated,"
            f" {report.fragmented_clusters * share:.2f}% fragmented,"
            f" {report.compressed_clusters * share:.2f}% compressed clusters"
        )
    lines.append(f"Image end offset: {report.image_end_offset}")
    return "".join(f"{line}\n" for line in lines)


def _were_found(number: int, what: str) -> str:
    return f"{counted(number, what)} {'was' if number == 1 else 'were'} found on the image"
