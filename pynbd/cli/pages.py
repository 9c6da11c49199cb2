"""The commands of a program as pages of a manual: what ``--help`` says, taken apart.

A block of the epilog, ``\\b`` and a title that ends in a colon, is a section of its own:
"Examples:", "Exit status:", "Environment:".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc

import click


@dataclass(frozen=True, slots=True)
class Section:
    """Lines that stay as they are, under a title; ``lead`` is what the title said more."""

    title: str
    lead: str
    lines: tuple[str, ...]

    @property
    def heading(self) -> str:
        """The whole title."""
        return ", ".join(filter(None, (self.title, self.lead)))


@dataclass(frozen=True, slots=True)
class Page:
    """One command. ``line`` is what one types: "pynbd serve"; ``usage`` what comes after it."""

    line: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    commands: tuple[Page, ...]

    @property
    def name(self) -> str:
        """The name of the page: "pynbd-serve"."""
        return self.line.replace(" ", "-")

    @property
    def summary(self) -> str:
        """The first sentence, without its end."""
        return self.paragraphs[0].partition(". ")[0].rstrip(".")

    def all(self) -> Iterator[Page]:
        """This page, and those of the subcommands."""
        yield self
        for command in self.commands:
            yield from command.all()


def page_of(command: click.Command, name: str, parent: click.Context | None = None) -> Page:
    """The page of ``command``, which is called ``name``, and with it those of its subcommands."""
    context = click.Context(command, parent, name, **command.context_settings)
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    subcommands = []
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            subcommand = command.get_command(context, below)
            if subcommand is not None and not subcommand.hidden:
                subcommands.append(page_of(subcommand, below, context))
    paragraphs, sections = _parts(command)
    return Page(
        line=context.command_path,
        usage=" ".join(command.collect_usage_pieces(context)),
        paragraphs=paragraphs,
        # Newer versions of click have a record for an argument, too, which says nothing.
        options=tuple((names, _flowing(text)) for names, text in filter(None, records) if text),
        sections=sections,
        commands=tuple(subcommands),
    )


def _parts(command: click.Command) -> tuple[tuple[str, ...], tuple[Section, ...]]:
    """The paragraphs of the help and of the epilog, and the sections between them."""
    paragraphs, sections = [], []
    text = f"{cleandoc(command.help or '')}\n\n{cleandoc(command.epilog or '')}".strip()
    for block in text.split("\n\n"):
        first, *lines = block.strip("\n").split("\n")
        if first == "\b":
            title, _, lead = lines[0].rstrip(":").partition(", ")
            sections.append(Section(title, lead, tuple(line[2:] for line in lines[1:])))
        else:
            paragraphs.append(_flowing(block))
    return tuple(paragraphs), tuple(sections)


def _flowing(text: str) -> str:
    return " ".join(text.split())
