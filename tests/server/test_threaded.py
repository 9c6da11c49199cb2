"""Servers in a thread of their own. What tests do with them is in tests/test_pytest_plugin.py."""

from __future__ import annotations

import subprocess
import sys

NO_LOOP = """
import os, resource
from pynbd.server.threaded import ServerThread

_, highest = os.pipe()
resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, highest + 2))  # a loop needs three
try:
    ServerThread([])
except OSError as error:
    os._exit(error.errno)  # an unfinished loop complains when it is collected
"""


def test_there_is_no_loop_to_have() -> None:
    """That is told, and nobody waits for ever."""
    done = subprocess.run([sys.executable, "-c", NO_LOOP], timeout=30, check=False)
    assert done.returncode == 24  # EMFILE
