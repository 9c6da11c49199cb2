"""How signals end ``pynbd serve``: TERM, INT, QUIT and HUP, from the first import to the last line.

They are blocked in every thread, and one thread waits for them. So there is no moment at which one
of them does what it does by default, whatever the loop, a library or the interpreter is busy with.

1. Until there is something to end, a signal ends the process; with status 0, as always.
2. Then the first one ends it in good order, and a second one at once: with status 1, and a line
   that tells what is lost, if an image was not finished.
3. What comes within a second of the first one is one and the same request: timeout(1) sends TERM to
   its child, and then to the group that it is in; shells and terminals do so, too.
4. HUP is left alone where it was ignored from the start: that is what nohup(1) is for. INT and QUIT
   are not: shells ignore them for everything in the background.

This module is light, because it comes before all that takes long to import.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache

ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
# Seconds in which signals are one and the same request.
ONE_REQUEST = 1.0


class Watch:
    """Waits for signals; there is one in a process, `watch`."""

    def __init__(self) -> None:
        self.stop: Callable[[], object] | None = None
        """Ends in good order, when there is something to end. Called in a thread of its own."""
        self.clean: Callable[[], object] = lambda: None
        """Removes what must not stay behind a process that ends at once."""
        self.last_line: Callable[[], str] = str
        """What an end at once loses, a line for standard error; "" if nothing. It takes no lock."""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._ending = ENDING - ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, self._ending)
        try:
            threading.Thread(target=self._wait, name="signals", daemon=True).start()
        except RuntimeError:
            sys.exit("pynbd: the host lets no thread start, and it takes one to wait for signals")

    def _wait(self) -> None:
        signal.sigwait(self._ending)
        if self.stop:
            until = time.monotonic() + ONE_REQUEST
            self.stop()
            while signal.sigtimedwait(self._ending, max(until - time.monotonic(), 0)):
                pass
            signal.sigwait(self._ending)
        self.clean()
        line = self.last_line()
        if line:
            _write_error(line)
        os._exit(1 if line else 0)


def _write_error(line: str) -> None:
    """Write to standard error, unless nobody reads it: an end at once waits for nobody."""
    errors = select.poll()
    errors.register(2, select.POLLOUT)
    with suppress(OSError):
        if errors.poll(0) == [(2, select.POLLOUT)]:
            os.write(2, f"{line}\n".encode(errors="replace")[: select.PIPE_BUF])


@cache
def watch() -> Watch:
    """The `Watch` of this process, which begins with the first call: in the main thread, before
    there are others.
    """
    return Watch()
