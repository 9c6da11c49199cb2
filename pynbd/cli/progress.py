"""A bar on standard error that shows how far a job is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from pynbd.client.workers import Progress

_STANDARD_ERROR = 2  # sys.stderr is None where the parent has closed it
# The bar hears of every so many parts of the whole.
_STEPS = 500


@contextmanager
def progress_bar(wanted: bool | None, total: int) -> Iterator[Progress]:
    """What to tell of bytes that are done; they add up to ``total``. ``wanted`` None: if a person
    looks on.
    """
    if not (os.isatty(_STANDARD_ERROR) if wanted is None else wanted):
        yield lambda _: None
        return
    # It takes longer to import than a small copy does, and is seldom seen.
    rich = import_module("rich.progress")
    console = import_module("rich.console").Console(stderr=True)
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
