"""What the commands that look print: sizes, tables, text from strangers; and who reads it.

A reader that leaves early (``| head``) ends a command without a word, with the status that a shell
gives to a program that SIGPIPE ended.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from pynbd.errors import PynbdError

_STATUS_OF_SIGPIPE = 141
# Of a line on standard error, without the program's name.
_LONGEST_LINE = 280
_GAP = " [...] "
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@contextmanager
def standard_output() -> Iterator[Callable[[str], object]]:
    """What writes text to standard output; all of it has arrived at the end of the context.

    Bytes of names that are not UTF-8 leave as they came. Raises `PynbdError` where it cannot be
    written.
    """

    def write(text: str) -> None:
        try:
            stream.write(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            _give_up(error)

    # There is no sys.stdout where the parent has closed it.
    stream = sys.stdout.buffer if sys.stdout else io.BytesIO()
    yield write
    try:
        stream.flush()
    except OSError as error:
        _give_up(error)


def drop_standard_output() -> None:
    """Let what is left of it go nowhere: the interpreter flushes it in the end."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _give_up(error: OSError) -> None:
    drop_standard_output()
    if isinstance(error, BrokenPipeError):
        raise SystemExit(_STATUS_OF_SIGPIPE)
    raise PynbdError(f"standard output: {error.strerror}") from None


def printable(text: str) -> str:
    """A name from an image or a server, without what a terminal would take for a command."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def one_line(text: str) -> str:
    """What is said of an image or a server, `printable`, and without its middle where it is long:
    the names that these give may be of any length.
    """
    text = printable(text)
    if len(text) <= _LONGEST_LINE:
        return text
    half = (_LONGEST_LINE - len(_GAP)) // 2
    return text[:half] + _GAP + text[-half:]


def in_units(count: int) -> str:
    """A number of bytes for people: ``1.5 MiB``; three digits are enough."""
    if count < 1 << 10:
        return f"{count} B"
    size, unit = count / (1 << 10), 0
    while size >= 1023.5 and unit + 1 < len(_UNITS):
        size, unit = size / (1 << 10), unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if size >= 100 else f"{size:.3g} {_UNITS[unit]}"


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Lines of columns that begin below each other; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    return "\n".join([heading(lines[0]), *lines[1:]]) + "\n"


def heading(text: str) -> str:
    """Bold where a person reads it (and does not mind: NO_COLOR)."""
    read = sys.stdout is not None and sys.stdout.isatty()
    return click.style(text, bold=True) if read and not os.environ.get("NO_COLOR") else text
