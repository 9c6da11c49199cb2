"""A bar on standard error that shows how far a job is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, TextIO

from pynbd.client.workers import Progress

_STANDARD_ERROR = 2  # sys.stderr is None where the parent has closed it
# The bar hears of every so many parts of the whole.
_STEPS = 500


class _Shown:
    """A file that loses what it cannot take: a terminal may go away while the job goes on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def progress_bar(wanted: bool | None, total: int) -> Iterator[Progress]:
    """What to tell of bytes that are done; they add up to ``total``. ``wanted`` None: if a person
    looks on.
    """
    is_shown = os.isatty(_STANDARD_ERROR) if wanted is None else wanted
    if not is_shown or sys.stderr is None:
        yield lambda _: None
        return
    # It takes longer to import than a small copy does, and is seldom seen.
    rich = import_module("rich.progress")
    console = import_module("rich.console").Console(file=_Shown(sys.stderr))
    columns = (
        rich.BarColumn(None),
        rich.TaskProgressColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        done = shown = 0

        def progress(count: int) -> None:
            nonlocal done, shown
            done += count
            if done - shown >= total // _STEPS or done == total:
                shown = done
                bar.update(task, completed=done)

        yield progress
