"""How pynbd-qemu-nbd lives: in the background, with a pid file, and until its clients have left."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import drop_in, peers, samples
from interop.drop_in import OURS, PROGRAMS, start, stop, wait_until

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    samples.sparse_file(tmp_path / "disk.raw", MIB)
    return tmp_path / "disk.raw"


@contextmanager
def forked(
    program: str, *args: str | Path, folder: Path, number: signal.Signals = signal.SIGTERM
) -> Iterator[tuple[int, Path]]:
    """The process and the socket of a server with ``--fork``."""
    pid_file = folder / f"{program}.pid"
    with peers.socket_path() as path:
        done = start(
            program, *args, "--fork", f"--pid-file={pid_file}", f"--socket={path}", folder=folder
        )
        pid = int(pid_file.read_text())
        try:
            # The moment that the parent has ended, the server is there.
            assert peers.connects(path)
            assert (done.returncode, done.stdout) == (0, "")
            yield pid, path
        finally:
            if drop_in.alive(pid):
                stop(pid, number)
        assert not path.exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_fork(program: str, disk: Path) -> None:
    peers.require("qemu-nbd", "nbdinfo")
    with forked(program, "-t", "-f", "raw", disk, folder=disk.parent) as (pid, path):
        assert os.getsid(pid) == pid != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        descriptors = [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]
        assert descriptors == ["/dev/null"] * 3
        assert peers.run("nbdinfo", "--size", peers.unix_uri(path)).stdout == f"{MIB}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_verbose_keeps_standard_error(program: str, disk: Path) -> None:
    peers.require("qemu-nbd")
    with forked(program, "-v", "-t", "-f", "raw", disk, folder=disk.parent) as (pid, _):
        assert os.readlink(f"/proc/{pid}/fd/2") == str(disk.parent / "said")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_end_it(number: signal.Signals, disk: Path) -> None:
    with forked(OURS, "-t", "-f", "raw", disk, folder=disk.parent, number=number) as (pid, _):
        assert drop_in.alive(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_in_the_foreground(number: signal.Signals, disk: Path) -> None:
    with (
        drop_in.running(OURS, "-t", "-f", "raw", disk, folder=disk.parent) as run,
    ):
        os.kill(run.process.pid, number)
        assert run.process.wait(10) == 0


def lock_is_held(path: Path) -> bool:
    """Whether another open file description has a lock on the file (fcntl(2), F_OFD_GETLK)."""
    flock = struct.Struct("hhqqi4x")
    with path.open("r+") as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, flock.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    return bool(flock.unpack(answer)[0] != fcntl.F_UNLCK)


@pytest.mark.parametrize("program", PROGRAMS)
def test_pid_file(program: str, disk: Path) -> None:
    peers.require("qemu-nbd")
    pid_file = disk.parent / f"{program}.pid"
    pid_file.write_text("something longer than any process ID\n")
    pid_file.chmod(0o600)
    with forked(program, "-t", "-f", "raw", disk, folder=disk.parent) as (pid, _):
        assert pid_file.read_text() == f"{pid}\n"
        assert lock_is_held(pid_file)
    assert pid_file.read_text() == f"{pid}\n"  # it stays
    wait_until(lambda: not lock_is_held(pid_file))


@pytest.mark.parametrize("program", PROGRAMS)
def test_pid_file_is_for_its_owner(program: str, disk: Path) -> None:
    peers.require("qemu-nbd")
    with forked(program, "-t", "-f", "raw", disk, folder=disk.parent):
        assert (disk.parent / f"{program}.pid").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("program", PROGRAMS)
def test_pid_file_in_the_foreground(program: str, disk: Path) -> None:
    peers.require("qemu-nbd")
    pid_file = disk.parent / "pid"
    args = ["-f", "raw", f"--pid-file={pid_file}", str(disk)]
    with drop_in.running(program, *args, folder=disk.parent) as run:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
        assert pid_file.read_text() == f"{run.process.pid}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_pid_file_of_a_process_that_lives(program: str, disk: Path) -> None:
    peers.require("qemu-nbd")
    with (
        forked(program, "-t", "-r", "-f", "raw", disk, folder=disk.parent) as (pid, _),
        peers.socket_path() as other,
    ):
        pid_file = disk.parent / f"{program}.pid"
        args = ["-r", "-f", "raw", "--fork", f"--pid-file={pid_file}", f"--socket={other}"]
        done = start(program, *args, disk, folder=disk.parent)
        assert done.returncode == 1
        assert done.stdout.count("\n") == 1
        assert pid_file.read_text() == f"{pid}\n"
        assert not peers.connects(other)


def test_fork_that_fails(tmp_path: Path) -> None:
    with peers.socket_path() as path:
        args = ["--fork", "--pid-file=pid", f"--socket={path}", "missing.raw"]
        done = start(OURS, *args, folder=tmp_path)
        assert not path.exists()
    assert done.returncode == 1
    assert done.stdout == f"{OURS}: missing.raw: cannot be opened: No such file or directory\n"
    assert not (tmp_path / "pid").exists()


def test_fork_with_a_warning(disk: Path) -> None:
    """The server runs, so that the status is 0; qemu-nbd makes it 1."""
    with peers.socket_path() as path:
        done = start(OURS, "--fork", "--pid-file=pid", f"--socket={path}", disk, folder=disk.parent)
        assert done.returncode == 0
        assert "guessed to be raw" in done.stdout
        stop(int((disk.parent / "pid").read_text()))


def test_readers_of_standard_error_see_its_end(disk: Path) -> None:
    """Who captures the output of the parent does not wait for the server."""
    with peers.socket_path() as path:
        args = ["-f", "raw", "--fork", "--pid-file=pid", f"--socket={path}"]
        done = drop_in.refused(OURS, *args, disk, folder=disk.parent)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        stop(int((disk.parent / "pid").read_text()))


@pytest.mark.parametrize("program", PROGRAMS)
def test_until_the_last_client_leaves(program: str, disk: Path) -> None:
    peers.require("qemu-nbd", "nbdinfo")
    with drop_in.running(program, "-e", "2", "-f", "raw", disk, folder=disk.parent) as run:
        assert run.process.poll() is None  # whoever looked whether it listens was no client
        # One that only asks for the list is none either.
        peers.run("nbdinfo", "--list", run.uri)
        assert run.process.poll() is None
        script = "g = nbd.NBD(); g.connect_uri(h.get_uri()); h.shutdown(); print(g.get_size())"
        assert peers.nbdsh(script, run.uri) == f"{MIB}\n"
        assert run.process.wait(5) == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_persistent(program: str, disk: Path) -> None:
    peers.require("qemu-nbd", "nbdinfo")
    with drop_in.running(program, "-t", "-f", "raw", disk, folder=disk.parent) as run:
        for _ in range(3):
            assert peers.run("nbdinfo", "--size", run.uri).stdout == f"{MIB}\n"
        assert run.process.poll() is None
    assert run.status == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_client_at_a_time(program: str, disk: Path) -> None:
    """The second one waits until the first has left, and is served then."""
    peers.require("qemu-nbd", "nbdinfo")
    with (
        drop_in.running(program, "-t", "-f", "raw", disk, folder=disk.parent) as run,
        subprocess.Popen(
            [*peers.command("nbdsh"), "-u", run.uri, "-c", "print('in', flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as first,
    ):
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with subprocess.Popen(
            [*peers.command("nbdinfo"), "--size", run.uri], stdout=subprocess.PIPE, text=True
        ) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(0.5)
            first.communicate("\n", timeout=10)
            assert second.communicate(timeout=10)[0] == f"{MIB}\n"


def test_the_parent_may_be_ended_while_it_waits(disk: Path) -> None:
    """The child goes on; nothing is printed twice."""
    with peers.socket_path() as path:
        args = ["-f", "raw", "--fork", "--pid-file=pid", f"--socket={path}", str(disk)]
        with subprocess.Popen([*drop_in.command(OURS, disk.parent), *args]) as parent:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
            wait_until(lambda: children.read_text() != "")
            os.kill(parent.pid, signal.SIGTERM)
            parent.wait(10)
        pid_file = disk.parent / "pid"
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
        stop(int(pid_file.read_text()))


def test_the_socket_of_a_server_that_lives(disk: Path) -> None:
    """qemu-nbd would take it away from it."""
    with drop_in.running(OURS, "-t", "-r", "-f", "raw", disk, folder=disk.parent) as run:
        path = run.uri.partition("socket=")[2]
        done = drop_in.refused(OURS, "-k", path, "-r", "-f", "raw", disk, folder=disk.parent)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"{OURS}: cannot listen on {path}: Address already in use\n"
        assert peers.run("nbdinfo", "--size", run.uri).stdout == f"{MIB}\n"


def test_trace(disk: Path) -> None:
    with peers.socket_path() as path, (disk.parent / "said").open("w") as said:
        line = ["-T", "nbd_*", "-f", "raw", f"--socket={path}", str(disk)]
        with subprocess.Popen([*drop_in.command(OURS), *line], stdout=said, stderr=said) as server:
            wait_until(lambda: peers.connects(path))
            peers.run("nbdinfo", "--map", peers.unix_uri(path))
            assert server.wait(5) == 0
    told = (disk.parent / "said").read_text()
    assert "NBD_OPT_GO" in told
    assert "NBD_CMD_BLOCK_STATUS" in told
