"""Files that are cut short, replaced, removed, or full while they are served; and those on which
opening would wait.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.faults.process import served
from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Data, Image
from tests.block.qcow2.test_faults import small_file_system
from tests.block.qcow2.writing import sound
from tests.block.reading import contents
from tests.conformance.client import Cmd, Disconnected, Errno, Mode

KiB, MiB = 1 << 10, 1 << 20
C = 64 * KiB
NOISE = random.Random(7).randbytes(4 * MiB)
FULL = "(pynbd: [^\n]*: No space left on device\n)+"
only_one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])  # the server has its own
SHORT = "(pynbd: [^\n]*: the file became shorter than the export\n)+"


def raw(folder: Path) -> Path:
    path = folder / "x.raw"
    path.write_bytes(NOISE)
    return path


def qcow2(folder: Path) -> Path:
    """All of the noise; the header and all tables are in the first two megabytes."""
    path = folder / "x.qcow2"
    clusters = {at: Data(NOISE[at : at + C]) for at in range(0, len(NOISE), C)}
    Image(size=len(NOISE), clusters=clusters).write(path)
    return path


@pytest.mark.parametrize(
    "mode, options",
    [(Mode.SIMPLE, ["-r"]), (Mode.STRUCTURED, ["-r"]), (Mode.EXTENDED, ["-f", "raw"])],
)
def test_a_raw_file_is_cut_short(tmp_path: Path, mode: Mode, options: list[str]) -> None:
    """What is not there any more is NBD_EIO; what is, is served; where it may, it grows again."""
    path = raw(tmp_path)
    with served(path, *options, says=SHORT) as server, server.enter(mode) as peer:
        assert peer.pread(0, 4 * MiB) == NOISE
        os.truncate(path, MiB + 100)
        assert peer.ask(Cmd.READ, 2 * MiB, 4 * KiB).error == Errno.EIO
        assert peer.ask(Cmd.READ, MiB, 4 * KiB).error == Errno.EIO
        assert peer.ask(Cmd.READ, 0, 2 * MiB).error == Errno.EIO
        assert peer.pread(MiB, 100) == NOISE[MiB : MiB + 100]
        assert peer.pread(0, MiB) == NOISE[:MiB]
        if "-r" not in options:
            assert peer.ask(Cmd.WRITE, 3 * MiB, payload=NOISE[:C]).error == Errno.OK
            assert peer.pread(3 * MiB, C) == NOISE[:C]
            assert peer.pread(2 * MiB, C) == bytes(C)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_file_is_cut_short_while_it_is_sent(tmp_path: Path, mode: Mode) -> None:
    """Where a reply can say so it ends with NBD_EIO; a simple one has to end the connection."""
    size = 32 * MiB
    path = tmp_path / "x.raw"
    path.write_bytes(8 * NOISE)
    with served(path, "-r", says="(pynbd: .*\n)*") as server:
        with server.enter(mode) as peer:
            peer.request(Cmd.READ, 0, size)
            peer.read(0)
            begun = peer.sock.recv(1)  # it is on its way, and does not fit into the socket
            os.truncate(path, MiB)
            peer.read = _after(begun, peer.read)  # type: ignore[assignment,method-assign]
            if mode is Mode.SIMPLE:
                with pytest.raises(Disconnected):
                    peer.reply(0, size)
            else:
                assert peer.reply(0, size).error == Errno.EIO
                assert peer.pread(0, MiB) == NOISE[:MiB]
        with server.enter(mode) as other:
            assert other.pread(0, MiB) == NOISE[:MiB]


def _after(begun: bytes, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """``read``, when so much was read already."""
    have = [begun]

    def reading(length: int) -> bytes:
        first = have.pop() if have and length else b""
        return first + read(length - len(first))

    return reading


def test_a_qcow2_file_is_cut_short(tmp_path: Path) -> None:
    """As in QEMU, what is missing reads as zeroes; that is told once."""
    path = qcow2(tmp_path)
    says = "pynbd: [^\n]*x.qcow2: the file was cut short; what is missing reads as zeroes\n"
    with served(path, "-r", says=says) as server, server.enter() as peer:
        assert peer.pread(0, 4 * MiB) == NOISE
        os.truncate(path, 2 * MiB)
        data = peer.pread(0, 4 * MiB)
        held = next(at for at in range(4 * MiB - C, 0, -C) if any(data[at : at + C]))
        assert data[:held] == NOISE[:held]
        assert not any(data[held + C :])
        assert peer.pread(0, C) == NOISE[:C]


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(100))
    other.rename(path)


@only_one_loop
@pytest.mark.parametrize(
    "happens",
    [_replaced, Path.unlink, lambda path: path.chmod(0), lambda path: shutil.rmtree(path.parent)],
    ids=["replaced", "removed", "unreadable", "folder-removed"],
)
@pytest.mark.parametrize("make", [raw, qcow2])
async def test_what_happens_to_its_name(
    tmp_path: Path, make: Callable[[Path], Path], happens: Callable[[Path], object]
) -> None:
    """It is no concern of a file that is open: it is served, written and closed as before."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = make(folder)
    with served(path, "-f", path.suffix[1:]) as server, server.enter() as peer:
        kept = tmp_path / "kept"
        os.link(path, kept)
        happens(path)
        assert peer.ask(Cmd.WRITE, C + 100, payload=NOISE[:C]).error == Errno.OK
        assert peer.ask(Cmd.FLUSH).error == Errno.OK
        expected = NOISE[: C + 100] + NOISE[:C] + NOISE[2 * C + 100 :]
        with server.enter() as other:
            assert other.pread(0, 4 * MiB) == expected
    async with await open_image(kept, format=path.suffix[1:]) as node:
        assert await contents(node) == expected


@pytest.mark.parametrize("role", ["image", "backing file", "data file"])
def test_a_pipe_in_the_place_of_a_file(tmp_path: Path, role: str) -> None:
    """Nobody waits for its other end: one line, and status 1."""
    pipe, path = tmp_path / "pipe", tmp_path / "x.qcow2"
    if role == "image":
        path = pipe
    elif role == "backing file":
        Image(size=MiB, backing_file="pipe", backing_format="raw").write(path)
    else:
        Image(size=MiB, data_file="pipe").write(path)
        pipe.unlink()
    os.mkfifo(pipe)
    line = [sys.executable, "-m", "pynbd", "serve", "-k", str(tmp_path / "s"), str(path)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
    named = "" if role == "image" else f" ({role} of {path})"
    problem = "cannot be opened: not a regular file or a block device"
    assert done.stderr == f"pynbd: {pipe}: {problem}{named}\n"
    assert done.returncode == 1


@only_one_loop
@pytest.mark.parametrize("form", ["raw", "qcow2"])
async def test_a_full_file_system(tmp_path: Path, form: str) -> None:
    """NBD_ENOSPC for what needs space, and for nothing else; when there is room again it goes on,
    and nothing that was answered is lost.
    """
    with small_file_system(tmp_path / "small", 4 * MiB) as folder:
        path, other = folder / f"x.{form}", folder / "other"
        if form == "raw":
            path.touch()
            os.truncate(path, 8 * MiB)
        else:
            Image(size=8 * MiB, clusters={}).write(path)
        with served(path, "-f", form, says=FULL) as server, server.enter() as peer:
            other.write_bytes(bytes(2 * MiB))
            fits = 0
            while peer.ask(Cmd.WRITE, fits, payload=NOISE[fits : fits + C]).error == Errno.OK:
                fits += C
            assert MiB <= fits <= 2 * MiB
            for _ in range(3):
                assert peer.ask(Cmd.WRITE, fits, payload=NOISE[:C]).error == Errno.ENOSPC
                assert peer.ask(Cmd.WRITE, 0, payload=NOISE[:C]).error == Errno.OK
                assert peer.ask(Cmd.FLUSH).error == Errno.OK
                assert peer.pread(0, fits) == NOISE[:fits]
            other.unlink()
            assert peer.ask(Cmd.WRITE, fits, payload=NOISE[fits : 3 * MiB]).error == Errno.OK
            assert peer.ask(Cmd.FLUSH).error == Errno.OK
            assert peer.pread(0, 3 * MiB) == NOISE[: 3 * MiB]
        copy = shutil.copyfile(path, tmp_path / "copy")
    if form == "qcow2":
        await sound(copy)
