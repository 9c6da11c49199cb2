"""A page of the manual in the language of man(7), as groff and mandoc read it.

1. Whatever a text has in it stands for itself: backslashes and hyphens are escaped, no line of text
   can be taken for a request, and what is not ASCII has its number.
2. The same commands give the same bytes: there is no date.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pynbd.cli.pages import Page, Section

_ESCAPES = str.maketrans(
    {
        "\\": r"\(rs",
        "-": r"\-",
        "'": r"\(aq",
        "`": r"\(ga",
        "^": r"\(ha",
        "~": r"\(ti",
        '"': r"\(dq",
    }
)


def man_page(page: Page, version: str, also: Iterable[str]) -> str:
    """The page; ``also`` are the others to see, such as "nbdinfo(1)"."""
    return "\n".join(_lines(page, version, also)) + "\n"


def _lines(page: Page, version: str, also: Iterable[str]) -> Iterator[str]:
    yield f'.TH "{escape(page.name.upper())}" 1 "" "{escape(f"pynbd {version}")}" "pynbd"'
    yield from (".ad l", ".nh", ".SH NAME")
    summary = page.summary[:1].lower() + page.summary[1:]
    yield f"{escape(page.name)} \\- {escape(summary)}"
    yield from (".SH SYNOPSIS", rf"\fB{escape(page.line)}\fR {escape(page.usage)}")
    yield ".SH DESCRIPTION"
    for paragraph in page.paragraphs:
        yield from (".PP", escape(paragraph))
    yield ".SH OPTIONS"
    for names, text in page.options:
        yield from (".TP", _option(names), escape(text))
    if page.commands:
        yield ".SH COMMANDS"
        for command in page.commands:
            yield from (".TP", _reference(f"{command.name}(1)"), escape(command.summary))
    for section in page.sections:
        yield from _section(section)
    yield ".SH SEE ALSO"
    yield ",\n".join(map(_reference, also))


def _section(section: Section) -> Iterator[str]:
    yield f".SH {escape(section.title.upper())}"
    if section.lead:
        yield f"{escape(section.lead[:1].upper() + section.lead[1:])}:"
    yield from (".PP", ".nf", ".RS 4")
    yield from map(escape, section.lines)
    yield from (".RE", ".fi")


def _option(names: str) -> str:
    """ "-k, --socket PATH": names are bold, and what they take is in italics."""
    words = [
        rf"\fB{escape(word)}\fR" if word.startswith("-") else rf"\fI{escape(word)}\fR"
        for word in re.split(r"(?:, | / | )", names)
    ]
    separators = re.findall(r", | / | ", names)
    return "".join(f"{word}{end}" for word, end in zip(words, [*separators, ""], strict=True))


def _reference(page: str) -> str:
    name, _, section = page.partition("(")
    return rf"\fB{escape(name)}\fR({section}"


def escape(text: str) -> str:
    """The text in a form in which roff prints it as it is."""
    escaped = text.translate(_ESCAPES)
    escaped = re.sub(r"[^\x00-\x7f]", lambda found: rf"\[u{ord(found[0]):04X}]", escaped)
    return rf"\&{escaped}" if escaped.startswith(".") else escaped
