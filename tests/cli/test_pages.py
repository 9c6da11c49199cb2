"""A command of click, taken apart into a page."""

from __future__ import annotations

import click

from pynbd.cli.pages import Page, Section, page_of


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def program() -> None:
    """Do things."""


@program.command(
    epilog="""And this is
    more of the description.

    \b
    Exit status, as of others:
      0  done
        - or not

    \b
    Examples:
      program thing x
    """
)
@click.argument("image")
@click.option("-f", "--format", "form", type=click.Choice(["raw", "qcow2"]), help="As what.")
@click.option("--limit", metavar="SECONDS", default=10.0, show_default=True, help="How  long.")
@click.option("--fast/--slow", help="How.")
@click.option("--secret", hidden=True)
def thing(**_: object) -> None:
    """Do one thing
    with IMAGE. It takes long.

    Another paragraph.
    """


@program.command(hidden=True)
def nothing() -> None:
    """Do nothing."""


HELP = ("-h, --help", "Show this message and exit.")
THING = Page(
    line="program thing",
    usage="[OPTIONS] IMAGE",
    paragraphs=(
        "Do one thing with IMAGE. It takes long.",
        "Another paragraph.",
        "And this is more of the description.",
    ),
    options=(
        ("-f, --format [raw|qcow2]", "As what."),
        ("--limit SECONDS", "How long. [default: 10.0]"),
        ("--fast / --slow", "How."),
        HELP,
    ),
    sections=(
        Section("Exit status", "as of others", ("0  done", "  - or not")),
        Section("Examples", "", ("program thing x",)),
    ),
    commands=(),
)


def test_page() -> None:
    page = page_of(program, "program")
    usage = "[OPTIONS] COMMAND [ARGS]..."
    assert page == Page("program", usage, ("Do things.",), (HELP,), (), (THING,))


def test_names() -> None:
    page = page_of(program, "program")
    assert [(page.name, page.summary) for page in page.all()] == [
        ("program", "Do things"),
        ("program-thing", "Do one thing with IMAGE"),
    ]


def test_headings() -> None:
    headings = [section.heading for section in THING.sections]
    assert headings == ["Exit status, as of others", "Examples"]
