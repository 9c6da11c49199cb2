"""How signals end ``pynbd serve``: TERM, INT, QUIT and HUP, from the first import to the last line.

They are blocked in every thread, and one thread waits for them. So there is no moment at which one
of them does what it does by default, whatever the loop, a library or the interpreter is busy with.

1. Until there is something to end, a signal ends the process; with status 0, as always.
2. Then the first one ends it in good order, and the second one at once: with status 1 if an image
   was not finished.
3. HUP is left alone where it was ignored from the start: that is what nohup(1) is for. INT and QUIT
   are not: shells ignore them for everything in the background.

This module is light, because it comes before all that takes long to import.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import cache

ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})


class Watch:
    """Waits for signals; there is one in a process, `watch`."""

    def __init__(self) -> None:
        self.stop: Callable[[], object] | None = None
        """Ends in good order, when there is something to end. Called in a thread of its own."""
        self.clean: Callable[[], object] = lambda: None
        """Removes what must not stay behind a process that ends at once."""
        self.unfinished: Callable[[], bool] = lambda: False
        """Whether an end at once loses something."""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._ending = ENDING - ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, self._ending)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        signal.sigwait(self._ending)
        if self.stop:
            self.stop()
            signal.sigwait(self._ending)
        self.clean()
        os._exit(1 if self.unfinished() else 0)


@cache
def watch() -> Watch:
    """The `Watch` of this process, which begins with the first call: in the main thread, before
    there are others.
    """
    return Watch()
