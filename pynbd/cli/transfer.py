"""What `copy` and `compare` have in common: their options, and how they run and are interrupted."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from pynbd.cli.complaints import complain
from pynbd.cli.descriptors import fill_standard_descriptors
from pynbd.cli.loops import FASTEST, LOOPS
from pynbd.cli.numbers import whole_number
from pynbd.client.ends import CONNECTIONS
from pynbd.client.workers import REQUEST_SIZE, REQUESTS
from pynbd.errors import UsageError

T = TypeVar("T")
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

_SIZE = re.compile(r"([0-9]{1,9})([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def power_of_two(low: int, high: int, *, or_none: bool = False) -> Callable[[str | int], int]:
    """The type of an option: so many bytes, from ``low`` to ``high``; with ``or_none``, or 0."""
    allowed = f"a power of two, {in_bytes(low)} to {in_bytes(high)}" + ", or 0" * or_none

    def convert(value: str | int) -> int:
        said = _SIZE.fullmatch(str(value))
        number = int(said[1]) * _UNITS[said[2].lower()] if said else -1
        is_allowed = low <= number <= high and number.bit_count() == 1
        if not is_allowed and not (or_none and number == 0):
            raise click.BadParameter(f"{value!r} is not {allowed}")
        return number

    return convert


def in_bytes(number: int) -> str:
    """4096 as 4k: as `power_of_two` reads it."""
    for unit in "mk":
        if number and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def transfer_options(command: _Decorated) -> _Decorated:
    """How much is under way at a time, and whether that is shown."""
    for option in (
        click.option(
            "--progress/--no-progress",
            default=None,
            help="Show how far it is (default: if standard error is a terminal).",
        ),
        click.option(
            "--request-size",
            metavar="SIZE",
            type=power_of_two(4 << 10, 32 << 20),
            default=in_bytes(REQUEST_SIZE),
            show_default=True,
            help="Bytes of one request, a power of two, 4k to 32m.",
        ),
        click.option(
            "-R",
            "--requests",
            metavar="NUM",
            type=whole_number(1, 1024),
            default=REQUESTS,
            show_default=True,
            help="Requests in flight.",
        ),
        click.option(
            "-C",
            "--connections",
            metavar="NUM",
            type=whole_number(1, 64),
            default=CONNECTIONS,
            show_default=True,
            help="Connections to each URI whose server allows more than one.",
        ),
    ):
        command = option(command)
    return command


def check_name(argument: str, name: str) -> None:
    """Raise `UsageError` for what names neither an image nor an export."""
    if not name:
        raise UsageError(f"{argument}: the name of an image or an NBD URI is expected")
    if name == "-":
        raise UsageError(f"{argument}: a pipe is no disk; a file of that name is ./-")


class Interrupted(Exception):  # not an error, but an order
    """A signal came; the text says what is left behind."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a job to its end. A signal ends it in good order and this process with its status, 128
    and the number of the signal.
    """
    fill_standard_descriptors()
    caught: list[int] = []
    try:
        result: T = LOOPS[FASTEST](_until_signal(work, caught))
        return result
    except Interrupted as interrupted:
        complain("pynbd", str(interrupted), 128 + caught[0])


async def _until_signal(work: Coroutine[Any, Any, T], caught: list[int]) -> T:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()

    def interrupt(number: int) -> None:
        caught.append(number)
        task.cancel()
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends it at once

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        raise Interrupted("interrupted") from None
