"""How the programs import what they run: fast, because clients wait for a server that starts.

1. What stands in `LATE` is imported when something of it is used, which in most servers is never,
   and otherwise before the first request. Who uses it imports the module, not names out of it.
2. The garbage collector looks at nothing meanwhile, and later at nothing of what was imported: that
   stays for ever, and one look at all of it would hold the event loop up for ten milliseconds.
3. numpy brings a linear algebra that starts a thread for every processor. Nothing here uses it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

LATE = frozenset(
    {
        "pynbd.block.overlay",  # --snapshot
        "pynbd.block.qcow2.repair",  # an image that was not closed properly
        "pynbd.block.qcow2.writer",  # a qcow2 image that is open for writing
        "pynbd.block.qcow2.zeroing",
        "pynbd.cli.python_export",  # --python
        "pynbd.cli.access_rules",  # --allow, --access
        "pynbd.cli.qemu_tls",  # --tls-creds
        "pynbd.cli.throwaway_tls",  # --tls=auto
        "pynbd.server.tls",  # TLS of any kind
        "pynbd.server.tracing",  # --trace
        "pynbd.tls.credentials",  # nbds://
        "pynbd.tls.files",
    }
)


class _LateFinder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in LATE else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def imported(name: str) -> ModuleType:
    """The module of that name, with all that it imports but `LATE`."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if _LateFinder not in sys.meta_path:
        sys.meta_path.insert(0, _LateFinder)
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()
