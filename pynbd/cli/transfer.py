"""What the commands that take long have in common: their options, and how they run and are
interrupted.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from pynbd.cli.complaints import complain
from pynbd.cli.descriptors import fill_standard_descriptors
from pynbd.cli.loops import FASTEST, LOOPS
from pynbd.cli.numbers import in_bytes, power_of_two, whole_number
from pynbd.cli.signals import ONE_REQUEST
from pynbd.client.ends import CONNECTIONS
from pynbd.client.workers import REQUEST_SIZE, REQUESTS
from pynbd.errors import UsageError

T = TypeVar("T")
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


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
    and the number of the signal; a second one, `ONE_REQUEST` after the first, ends it at once.
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

    ending = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]

    def interrupt(number: int) -> None:
        if not caught:
            task.cancel()
            loop.call_later(ONE_REQUEST, from_now_on, signal.SIG_DFL)
        caught.append(number)

    def from_now_on(action: signal.Handlers) -> None:
        for number in ending:
            loop.remove_signal_handler(number)
            signal.signal(number, action)

    for number in ending:
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        raise Interrupted("interrupted") from None
    finally:
        if caught:
            from_now_on(signal.SIG_IGN)  # it is about to end, with its status
