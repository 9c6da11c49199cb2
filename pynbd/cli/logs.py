"""What the programs say on standard error while they run: how much, and as text or as JSON.

1. Text is a line for people, with the name of the program before it; what passes on a connection
   (``--trace``) has the time there instead. Whatever a name has in it, a terminal takes none of it
   for a command, and a long one leaves room for what is said of it.
2. JSON is one object a line: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``; for
   ``--trace`` also ``connection``, ``direction`` and ``nbd``, the message and its fields; where a
   defect shows, ``traceback``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click

from pynbd.cli.output import one_line, printable

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_P = ParamSpec("_P")
_T = TypeVar("_T")

TRACE = logging.getLogger("pynbd.trace")


def log_options(command: _Decorated) -> _Decorated:
    """Give a command the options ``verbose``, ``trace`` and ``log_format``, for `configure`."""
    verbose = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Tell of clients that come and go, and of those that are cut off, and why.",
    )
    return verbose(_trace_options(command))


def told(command: Callable[_P, _T]) -> Callable[..., _T]:
    """Give a command that is no server the options ``trace`` and ``log_format``, and heed them."""

    @wraps(command)
    def configured(*args: Any, trace: bool, log_format: str, **options: Any) -> _T:
        configure(verbose=False, trace=trace, log_format=log_format)
        return command(*args, **options)

    return _trace_options(configured)


def _trace_options(command: _Decorated) -> _Decorated:
    for option in (
        click.option(
            "--log-format",
            type=click.Choice(list(_FORMATTERS)),
            default="text",
            show_default=True,
            help="How standard error is written: for people, or an object on each line.",
        ),
        click.option(
            "--trace",
            is_flag=True,
            help="Tell every message of the protocol on standard error (> to the server, < back),"
            " with the first members of a list.",
        ),
    ):
        command = option(command)
    return command


def configure(*, verbose: bool, trace: bool, log_format: str, program: str = "pynbd") -> None:
    """Let the loggers of this process write to standard error what these options ask for."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FORMATTERS[log_format](program))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    TRACE.setLevel(logging.DEBUG if trace else logging.WARNING)


def last_words(program: str, text: str) -> None:
    """Why the program ends, in the form of all that it has said before."""
    if any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers):
        logging.getLogger("pynbd").error("%s", text)
    else:
        click.echo(f"{program}: {one_line(text)}", err=True)


def line_of(text: str) -> str:
    """The line by which the log tells an error; made without its locks, which whoever is stuck may
    hold.
    """
    record = logging.LogRecord("pynbd", logging.ERROR, "", 0, text, None, None)
    return logging.getLogger().handlers[0].format(record)


class _Formatter(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program


class _Text(_Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        lines = record.message.split("\n")
        if record.name != TRACE.name:
            return f"{self._program}: " + "\n".join(map(one_line, lines))
        message = "\n".join(map(printable, lines))
        time = datetime.fromtimestamp(record.created)
        return f"{time:%H:%M:%S.%f} {message}"


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= getattr(record, "trace", {})
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


_FORMATTERS: dict[str, type[_Formatter]] = {"text": _Text, "json": _Json}
