"""The plugin of pytest: the fixture `nbd_server`.

pytest imports this at every start, of every project in whose environment pynbd is: so nothing of
the server is imported before a test asks for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pynbd.server.disk import Disk
    from pynbd.server.threaded import ServerThread


class NbdServer:
    """What the fixture `nbd_server` is: call it to start a server.

    ``errors``: what the servers of this test have logged as errors, such as a request that failed.
    What is in it when the test ends fails the test; a test that wants such a failure looks at it,
    and clears it.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._thread: ServerThread | None = None

    def __call__(
        self,
        image: str | os.PathLike[str] | Disk | bytes | None = None,
        *,
        size: int | None = None,
        **options: Any,
    ) -> str:
        """Start to serve an image file, a `pynbd.Disk`, a disk in memory with these bytes, or one
        of ``size`` zeroes; ``options`` are those of `pynbd.serve`. Returns the URI: clients can
        connect, and can until the test ends.
        """
        __tracebackhide__ = True
        served = size if image is None else image
        if served is None or (image is not None and size is not None):
            raise TypeError("nbd_server: either an image or size= is expected")
        if self._thread is None:
            self._thread = import_module("pynbd.server.threaded").ServerThread(self.errors)
        return self._thread.serve(served, **options)

    def stop(self) -> None:
        """End the servers; the fixture does it."""
        if self._thread is not None:
            self._thread.stop()


@pytest.fixture
def nbd_server() -> Iterator[NbdServer]:
    """Call it with an image, and get a URI: ``nbd_server("disk.qcow2", read_only=True)``."""
    server = NbdServer()
    yield server
    server.stop()
    if server.errors:
        pytest.fail("\n".join(["the server has logged errors:", *server.errors]), pytrace=False)
