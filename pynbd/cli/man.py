"""``pynbd man``: the manual, made of what the commands say of themselves.

Pages for man(1), or all of them as Markdown: docs/reference.md is that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import click

from pynbd.cli.output import standard_output
from pynbd.cli.pages import Page, Section, page_of
from pynbd.cli.qemu_nbd.command import NAME as QEMU_NBD
from pynbd.cli.qemu_nbd.command import qemu_nbd
from pynbd.cli.roff import man_page

_OTHERS = ("nbdcopy(1)", "nbdinfo(1)", "nbdkit(1)", "qemu-img(1)", "qemu-nbd(8)")

_STATUS = "Exit status"
# Where a command says nothing else of it.
_STATUSES = Section(
    _STATUS,
    "",
    (
        "0  success",
        "1  an error, which is one line on standard error",
        "2  arguments that make no sense",
    ),
)

_TITLE = """\
# Reference

Every command, as its `--help` has it. `pynbd man` writes the same as man pages; this page is what
`pynbd man --markdown` prints.
"""


@click.command(
    short_help="Write the manual as man pages.",
    epilog="""\b
Examples:
  pynbd man ~/.local/share/man/man1
  pynbd man --markdown > reference.md
""",
)
@click.argument("directory", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--markdown", is_flag=True, help="Print one text in Markdown, and write no files.")
@click.pass_context
def man(context: click.Context, directory: Path, markdown: bool) -> None:
    """Write the manual as man pages into DIRECTORY: pynbd.1, pynbd-serve.1 and so on.

    DIRECTORY is made where it is missing; without it, they are written where you are. The names
    of the files are printed.
    """
    programs = {"pynbd": context.find_root().command, QEMU_NBD: qemu_nbd}
    roots = [_completed(page_of(command, name)) for name, command in programs.items()]
    pages = [page for root in roots for page in root.all()]
    with standard_output() as write:
        if markdown:
            write(reference(pages))
            return
        directory.mkdir(parents=True, exist_ok=True)
        for page in pages:
            others = [f"{other.name}(1)" for other in pages if other is not page]
            path = directory / f"{page.name}.1"
            path.write_text(man_page(page, version("pynbd"), [*others, *_OTHERS]))
            write(f"{path}\n")


def _completed(page: Page) -> Page:
    """The page with a section on the exit status."""
    commands = tuple(map(_completed, page.commands))
    told = any(section.title == _STATUS for section in page.sections)
    sections = page.sections if told else (_STATUSES, *page.sections)
    return replace(page, sections=sections, commands=commands)


def reference(pages: Iterable[Page]) -> str:
    """The manual as Markdown."""
    return "\n".join([_TITLE, *(line for page in pages for line in _markdown(page))])


def _markdown(page: Page) -> Iterator[str]:
    yield from (f"## {page.line}", "")
    for paragraph in page.paragraphs:
        yield from (_escape(paragraph), "")
    yield from ("```text", f"{page.line} {page.usage}", "```", "")
    for names, text in page.options:
        yield f"* `{names}`: {_escape(text)}"
    yield ""
    if page.commands:
        yield from ("**Commands**", "")
        for command in page.commands:
            yield f"* [{command.line}](#{command.name}): {_escape(command.summary)}"
        yield ""
    for section in page.sections:
        yield from (f"**{section.heading}**", "", "```text", *section.lines, "```", "")


def _escape(text: str) -> str:
    return re.sub(r"[\\`*<\[\]]", r"\\\g<0>", text)
