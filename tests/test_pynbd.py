"""The public names of the package, and the example that shows them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import pytest

import pynbd
from pynbd.block.qcow2.builder import Image
from pynbd.protocol.uri import NbdUri


def test_every_public_name_is_there() -> None:
    namespace: dict[str, object] = {}
    exec("from pynbd import *", namespace)
    assert set(pynbd.__all__) == namespace.keys() - {"__builtins__"}
    assert set(pynbd.__all__) >= {"open_image", "Export", "ExportTable", "Server"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pynbd.nonsense  # type: ignore[attr-defined]


def test_what_a_prompt_completes() -> None:
    """Also what nobody has asked for yet."""
    program = "import pynbd; assert dir(pynbd) == sorted(pynbd.__all__)"
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0


def test_what_the_options_of_images_are_made_of() -> None:
    """Who calls `open_image` has the types of its arguments."""
    hints = get_type_hints(pynbd.open_image)
    assert hints["cache"] is pynbd.Cache


def test_every_exception_is_public() -> None:
    tree = [pynbd.PynbdError]
    for error in tree:
        assert getattr(pynbd, error.__name__) is error
        tree += error.__subclasses__()


def test_importing_is_cheap() -> None:
    program = "import pynbd, sys; sys.exit(not {'asyncio', 'numpy'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0


def test_the_example_serves(tmp_path: Path) -> None:
    Image(size=1 << 20).write(tmp_path / "disk.qcow2")
    assert pynbd.__doc__
    example = textwrap.dedent(pynbd.__doc__.split("::\n", 1)[1].split("\nEverything", 1)[0])
    program = [sys.executable, "-u", "-c", example]
    with (
        subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process,
        socket.socket(socket.AF_UNIX) as client,
    ):
        assert process.stdout is not None
        client.settimeout(10)
        client.connect(NbdUri.parse(process.stdout.readline().strip()).socket)
        assert client.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\0\3"
        process.send_signal(signal.SIGINT)  # as a person would, whom asyncio.run serves
        assert process.wait(10)
