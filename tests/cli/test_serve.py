"""``pynbd serve`` as its users start it: a process, its output, its status, and real clients."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from interop import peers
from pynbd.block.qcow2.builder import Bitmap, Data, Image, InternalSnapshot
from pynbd.block.qcow2.format import BitmapFlags, Incompatible

K, M = 1 << 10, 1 << 20
PYNBD = [sys.executable, "-m", "pynbd"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw image."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"raw bytes".ljust(M, b"\xaa"))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An overlay with bitmaps, an internal snapshot, and a backing file with a
    bitmap.
    """
    Image(size=M, clusters={0: Data(b"base")}, bitmaps=[Bitmap("below"), Bitmap("both")]).write(
        tmp_path / "base.qcow2"
    )
    path = tmp_path / "top.qcow2"
    Image(
        size=M,
        clusters={64 * K: Data(b"active")},
        snapshots=[InternalSnapshot("before", {64 * K: Data(b"earlier")})],
        backing_file="base.qcow2",
        backing_format="qcow2",
        bitmaps=[
            Bitmap("one"),
            Bitmap("both", dirty=[(0, 1)]),
        ],
    ).write(path)
    return path


@pytest.fixture
def torn(tmp_path: Path, image: Path) -> Path:
    """An overlay of that one with inconsistent bitmaps, and nothing else."""
    flags = BitmapFlags.AUTO | BitmapFlags.IN_USE
    path = tmp_path / "torn.qcow2"
    Image(
        size=M,
        backing_file="top.qcow2",
        backing_format="qcow2",
        bitmaps=[Bitmap("torn", flags=flags), Bitmap("worn", flags=flags)],
    ).write(path)
    return path


class Running:
    """A server that has printed its URI."""

    def __init__(self, process: subprocess.Popen[str], uri: str) -> None:
        self.process = process
        self.uri = uri

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; status, rest of the output, standard error."""
        self.process.send_signal(number)
        said, errors = self.process.communicate(timeout=20)
        return self.process.returncode, said, errors


@contextmanager
def started(*args: str | Path, **options: Any) -> Iterator[Running]:
    line = [*PYNBD, "serve", *map(str, args)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            if not uri:
                _, errors = process.communicate(timeout=20)
                raise AssertionError(f"it did not start: {errors}")
            yield Running(process, uri)
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def serving(*args: str | Path, errors: str = "", **options: Any) -> Iterator[str]:
    """The URI; at the end SIGTERM, status 0, and nothing but ``errors`` on standard error."""
    with started(*args, **options) as server:
        yield server.uri
        assert server.end() == (0, "", errors)


def failing(*args: str | Path, **options: Any) -> tuple[int, str]:
    """Status and standard error of a server that does not start."""
    done = subprocess.run(
        [*PYNBD, "serve", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        **options,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def one_line(said: tuple[int, str], status: int, *parts: object) -> None:
    """One line on standard error, with ``parts`` in it."""
    assert said[0] == status, said
    assert re.fullmatch(r"pynbd: [^\n]+\n", said[1]), said
    for part in parts:
        assert str(part) in said[1]


def connect(uri: str) -> socket.socket:
    """A connection to the address of a URI."""
    if match := re.fullmatch(r"nbd\+unix:///[^?]*\?socket=(.*)", uri):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(unquote(match[1]))
        return sock
    match = re.match(r"nbd://([^/]+):(\d+)", uri)
    assert match
    return socket.create_connection((match[1], int(match[2])), 10)


def greeted(sock: socket.socket) -> bool:
    return sock.recv(18) == b"NBDMAGICIHAVEOPT\0\3"


def export_name(sock: socket.socket, name: bytes = b"") -> int:
    """The size of the export; the connection is in transmission then."""
    assert greeted(sock)
    sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
    size: int = struct.unpack(">QH", sock.recv(10))[0]
    return size


def read(sock: socket.socket, offset: int, length: int) -> bytes:
    sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
    magic, error, _ = struct.unpack(">IIQ", sock.recv(16, socket.MSG_WAITALL))
    assert (magic, error) == (0x67446698, 0)
    return sock.recv(length, socket.MSG_WAITALL)


def info(uri: str) -> dict[str, Any]:
    """What nbdinfo says of the one export."""
    peers.require("nbdinfo")
    said = json.loads(peers.run("nbdinfo", "--json", uri).stdout)
    (export,) = said["exports"]
    return dict(export)


# Where it listens --------------------------------------------------------------------------------


def test_the_first_line_is_the_uri(disk: Path) -> None:
    """It listens before it prints."""
    with serving("-p", "0", disk) as uri:
        assert re.fullmatch(r"nbd://localhost:\d+/?", uri)
        with connect(uri) as sock:
            assert export_name(sock) == M
            assert read(sock, 0, 9) == b"raw bytes"


def test_an_address(disk: Path) -> None:
    with serving("-b", "127.0.0.1", "-p", "0", disk) as uri, connect(uri) as sock:
        assert uri.startswith("nbd://127.0.0.1:")
        assert greeted(sock)


def test_a_unix_socket(disk: Path) -> None:
    with peers.socket_path() as path:
        with serving("-k", path, disk) as uri, connect(uri) as sock:
            assert uri == f"nbd+unix:///?socket={path}"
            assert export_name(sock) == M
        assert not path.exists()


def test_a_relative_unix_socket(disk: Path) -> None:
    with peers.socket_path() as path, serving("-k", "s", disk, cwd=path.parent) as uri:
        assert uri == f"nbd+unix:///?socket={path.parent}/s"


def test_a_stale_socket_is_replaced(disk: Path) -> None:
    with peers.socket_path() as path:
        with started("-k", path, disk) as server:
            server.process.kill()
        assert path.is_socket()
        with serving("-k", path, disk) as uri, connect(uri) as sock:
            assert greeted(sock)


def test_a_live_socket_is_not(disk: Path, image: Path) -> None:
    with peers.socket_path() as path, serving("-k", path, disk) as uri:
        one_line(failing("-k", path, image), 1, path, "in use")
        with connect(uri) as sock:
            assert greeted(sock)


def test_a_file_is_not_a_socket(disk: Path, image: Path) -> None:
    for path in (disk, disk.parent):
        one_line(failing("-k", path, image), 1, path, "exists and is not a socket")
    assert disk.read_bytes()[:9] == b"raw bytes"


def test_a_taken_port(disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_line(failing("-b", "127.0.0.1", "-p", str(port), disk), 1, port, "in use")


# What clients are told ---------------------------------------------------------------------------


def test_name_and_description(disk: Path) -> None:
    with serving("-p", "0", "-x", "a b/ü", "-D", "what it is", disk) as uri:
        assert uri.endswith("/a%20b/%C3%BC")
        export = info(uri)
        assert (export["export-name"], export["description"]) == ("a b/ü", "what it is")
        assert export["export-size"] == M
        with connect(uri) as sock:
            assert greeted(sock)
            sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 5) + b"other")
            assert sock.recv(10) == b""


def test_read_only_and_writable(disk: Path, image: Path) -> None:
    for path in disk, image:
        with serving("-p", "0", path) as uri:
            export = info(uri)
            assert (export["is_read_only"], export["can_multi_conn"]) == (False, True)
    for options in (["-r", disk], ["-r", image], ["-l", "before", image]):
        with serving("-p", "0", *options) as uri:
            assert info(uri)["is_read_only"] is True


@pytest.mark.parametrize(
    "options, kept",
    [
        ("", 3),
        ("--discard=ignore", 4),
        ("--detect-zeroes=on", 3),
        ("--detect-zeroes=unmap", 2),
    ],
)
def test_discards_and_zeroes(tmp_path: Path, options: str, kept: int) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xaa" * (256 * K))
    with serving("-p", "0", "-f", "raw", *options.split(), disk) as uri:
        peers.nbdsh("h.trim(65536, 0); h.pwrite(bytes(65536), 65536)", uri)
    assert disk.stat().st_blocks * 512 == kept * 64 * K


def test_the_exact_size(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(1001))
    with serving("-p", "0", path) as uri:
        assert info(uri)["export-size"] == 1001


def test_the_number_of_clients(disk: Path) -> None:
    with serving("-e", "1", "-p", "0", disk) as uri:
        assert info(uri)["can_multi_conn"] is False
        first = connect(uri)
        assert export_name(first) == M
        second = connect(uri)
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(18)
        first.close()
        second.settimeout(10)
        assert greeted(second)
        second.close()


def test_the_handshake_limit(disk: Path) -> None:
    with serving("--handshake-limit", "0.2", "-p", "0", disk) as uri, connect(uri) as sock:
        assert greeted(sock)
        start = time.monotonic()
        assert sock.recv(1) == b""
        assert time.monotonic() - start < 5


LIMITS = {
    "--handshake-limit": "5",
    "--stall-limit": "0.5",
    "--max-per-address": "2",
    "--max-options": "4",
    "--max-option-bytes": "1M",
    "--max-memory": "64M",
    "--max-requests": "8",
    "--max-received": "32M",
    "--max-queued": "32M",
}


def test_the_limits_of_clients(disk: Path) -> None:
    """All are taken together; two of them are reached. (Each of them: tests/server.)"""
    options = [word for option in LIMITS.items() for word in option]
    with started(*options, "-v", "-p", "0", "-b", "127.0.0.1", disk) as server:
        with connect(server.uri) as first, connect(server.uri), connect(server.uri) as third:
            port = first.getsockname()[1]
            assert third.recv(1) == b""
            assert greeted(first)
            first.sendall(struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", 99, 0) * 5)
            while first.recv(1 << 16):
                pass
        status, _, errors = server.end()
    assert status == 0
    assert errors.splitlines() == [
        "pynbd: 127.0.0.1 refused: it has 2 connections",
        f"pynbd: 127.0.0.1:{port} disconnected: 5 options of 80 bytes, and no end of them",
    ]


@pytest.mark.parametrize(
    "option, value",
    [
        ("--stall-limit", "-1"),
        ("--max-per-address", "-1"),
        ("--max-options", "x"),
        ("--max-memory", "1X"),
        ("--max-requests", "0"),
        ("--max-received", "0"),
        ("--max-queued", "-1"),
    ],
)
def test_limits_that_are_none(disk: Path, option: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pynbd", "serve", option, value, str(disk)],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"pynbd: {option}: {value!r} is not a")
    assert done.stderr.count("\n") == 1


def test_verbose(disk: Path) -> None:
    """Clients that come, ask for what is not there, and leave; a probe of the port is not one."""
    with started("-v", "-p", "0", "-b", "127.0.0.1", "-x", "disk", disk) as server:
        with connect(server.uri) as sock:
            one = sock.getsockname()[1]
            assert export_name(sock, b"disk") == M
        with connect(server.uri) as sock:
            two = sock.getsockname()[1]
            assert greeted(sock)
            sock.sendall(struct.pack(">I", 3))
            for option, data in ((8, b""), (7, b"other"), (7, b"disk")):
                data = struct.pack(">I", len(data)) + data + bytes(2) if data else b""
                sock.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)
            time.sleep(0.1)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        connect(server.uri).close()
        status, said, errors = server.end()
    assert (status, said) == (0, "")
    assert errors.splitlines() == [
        f"pynbd: 127.0.0.1:{one} has come: export 'disk', simple replies",
        f"pynbd: 127.0.0.1:{one} has left",
        f"pynbd: 127.0.0.1:{two} asked for export 'other', which is not there",
        f"pynbd: 127.0.0.1:{two} has come: export 'disk', structured replies",
        f"pynbd: 127.0.0.1:{two} has left",
    ]


# Contexts ----------------------------------------------------------------------------------------

BASE, DEPTH = "base:allocation", "qemu:allocation-depth"


@pytest.mark.parametrize(
    "options, contexts",
    [
        ("", [BASE, DEPTH, "one", "both"]),
        ("-A", [BASE, DEPTH]),
        ("-B both", [BASE, "both"]),
        ("-B both -B one -B both", [BASE, "both", "one"]),
        ("-A -B one", [BASE, DEPTH, "one"]),
        ("-l before", [BASE, DEPTH]),
        ("-r", [BASE, DEPTH, "one", "both"]),
    ],
)
def test_contexts(image: Path, options: str, contexts: list[str]) -> None:
    """Unasked: depth and the active layer's consistent bitmaps. Asked: exactly those."""
    with serving("-p", "0", *options.split(), image) as uri:
        assert sorted(info(uri)["contexts"]) == sorted(
            name if ":" in name else f"qemu:dirty-bitmap:{name}" for name in contexts
        )


def test_very_many_bitmaps_are_not_offered_unasked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    Image(size=M, bitmaps=[Bitmap(f"{number:02}") for number in range(65)]).write(path)
    with started("-p", "0", path) as server:
        names = [name for name in info(server.uri)["contexts"] if "bitmap" in name]
        assert sorted(names) == [f"qemu:dirty-bitmap:{number:02}" for number in range(64)]
        status, _, errors = server.end()
    one_line((status, errors), 0, "disk.qcow2", "64 of its 65", "naming")
    with serving("-p", "0", "-B", "64", path) as uri:
        assert "qemu:dirty-bitmap:64" in info(uri)["contexts"]


def test_a_bitmap_of_a_backing_file_is_served_with_a_warning(image: Path) -> None:
    with started("-p", "0", "-B", "below", image) as server:
        assert "qemu:dirty-bitmap:below" in info(server.uri)["contexts"]
        status, _, errors = server.end()
    one_line((status, errors), 0, "'below'", "base.qcow2", "backing file")


def test_a_bitmap_of_a_backing_file_is_hidden_by_its_namesake(image: Path) -> None:
    """The first one from the top, which is dirty where the other is clean."""
    peers.require("nbdinfo")
    with serving("-p", "0", "-B", "both", image) as uri:
        said = peers.run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:both", uri).stdout
    assert [(row["length"], row["type"]) for row in json.loads(said)] == [
        (64 * K, 1),
        (M - 64 * K, 0),
    ]


@pytest.mark.parametrize(
    "options, status, parts",
    [
        (
            "-B nosuch",
            1,
            ["no bitmap 'nosuch'; there are 'one', 'both', 'below' (in base.qcow2)\n"],
        ),
        ("-B one -l before", 2, ["--bitmap", "-l"]),
        ("-l nosuch", 1, ["top.qcow2", "nosuch"]),
    ],
)
def test_what_cannot_be_offered(image: Path, options: str, status: int, parts: list[str]) -> None:
    one_line(failing("-p", "0", *options.split(), image), status, *parts)


def test_inconsistent_bitmaps(torn: Path) -> None:
    """They are named, and not offered; with -A nobody wanted any."""
    line = f"pynbd: {torn}: inconsistent bitmaps are not offered: 'torn', 'worn'\n"
    with serving("-p", "0", torn, errors=line) as uri:
        assert not any("bitmap" in context for context in info(uri)["contexts"])
    with serving("-p", "0", "-A", torn):
        pass
    one_line(failing("-p", "0", "-B", "torn", torn), 1, torn, "'torn'", "inconsistent")
    known = "there are 'one' (in top.qcow2), 'both' (in top.qcow2), 'below' (in base.qcow2)\n"
    one_line(failing("-p", "0", "-B", "no", torn), 1, known)


def test_images_with_a_bitmap_or_none(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "one.qcow2"
    Image(size=M, bitmaps=[Bitmap("one")]).write(path)
    one_line(failing("-p", "0", "-B", "no", path), 1, "there is 'one'\n")
    one_line(failing("-p", "0", "-B", "no", disk), 1, "there is none\n")


@pytest.mark.parametrize("name", ["before", "snapshot.name=before", "1", "snapshot.id=1"])
def test_a_snapshot(image: Path, name: str) -> None:
    with serving("-p", "0", "-l", name, image) as uri, connect(uri) as sock:
        assert export_name(sock) == M
        assert read(sock, 64 * K, 7) == b"earlier"
        assert read(sock, 0, 4) == b"base"


# What is not served ------------------------------------------------------------------------------


def test_bad_images(tmp_path: Path, image: Path, disk: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    damaged = tmp_path / "damaged.qcow2"
    damaged.write_bytes(image.read_bytes()[:100])
    vmdk = tmp_path / "disk.vmdk"
    vmdk.write_bytes(b"KDMV".ljust(M, b"\0"))
    for path, *rest in (
        (tmp_path / "missing", "No such file"),
        (directory, "Is a directory"),
        (damaged,),
        (vmdk, "vmdk", "-f raw"),
    ):
        one_line(failing("-p", "0", path), 1, path, *rest)
    one_line(failing("-p", "0", "-f", "qcow2", disk), 1, disk, "raw")
    (tmp_path / "base.qcow2").unlink()
    one_line(failing("-p", "0", image), 1, "base.qcow2", "top.qcow2", "No such file")


def test_a_locked_image(disk: Path) -> None:
    with serving("-p", "0", disk):
        one_line(failing("-p", "0", disk), 1, disk)
        one_line(failing("-p", "0", "-r", disk), 1, disk, "--force-share")
        with started("-p", "0", "--force-share", disk) as server:
            assert info(server.uri)["is_read_only"] is True
            status, _, errors = server.end()
        one_line((status, errors), 0, disk, "inconsistent")


def test_an_image_that_may_only_be_read(disk: Path) -> None:
    """A line that says how it is served all the same."""
    disk.chmod(0o444)
    # Root may write everything, but not without its capabilities.
    bare = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.getuid() == 0 else []
    line = [*bare, *PYNBD, "serve", "-p", "0", str(disk)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)
    one_line((done.returncode, done.stderr), 1, disk, "Permission denied", "-r serves it")
    with serving("-p", "0", "-r", disk) as uri:
        assert info(uri)["is_read_only"] is True


def test_a_qcow2_image_that_cannot_be_written(tmp_path: Path) -> None:
    """Its corrupt bit says so: a line, nothing is changed, and -r reads what is left."""
    path = tmp_path / "corrupt.qcow2"
    Image(size=M, clusters={0: Data(b"left")}, incompatible=Incompatible.CORRUPT).write(path)
    before = path.read_bytes()
    one_line(failing("-p", "0", path), 1, path, "corrupt", "-r")
    assert path.read_bytes() == before
    told = f"pynbd: {path}: the image is marked corrupt; it is only read\n"
    with serving("-p", "0", "-r", path, errors=told) as uri, connect(uri) as sock:
        assert export_name(sock) == M
        assert read(sock, 0, 4) == b"left"


def test_a_qcow2_image_is_written(image: Path) -> None:
    """What a client has written and not flushed is there when the server has ended."""
    with serving("-p", "0", image) as uri:
        peers.nbdsh("h.pwrite(b'written', 65536 + 3)", uri)
    peers.run("qemu-img", "check", image)
    peers.run("qemu-io", "-f", "qcow2", "-c", "read -P 0x77 65539 1", image)  # a w
    with serving("-p", "0", "-r", image) as uri, connect(uri) as sock:
        assert export_name(sock) == M
        assert read(sock, 64 * K, 10) == b"actwritten"
    with serving("-p", "0", "-l", "before", image) as uri, connect(uri) as sock:
        assert export_name(sock) == M
        assert read(sock, 64 * K, 10) == b"earlier\0\0\0"


def test_a_throw_away_overlay(image: Path) -> None:
    """Over an internal snapshot, too, which nobody can write else."""
    before = image.read_bytes()
    for options, found in ([], b"actXve"), (["-l", "before"], b"earXier"):
        with serving("-p", "0", "-s", *options, image) as uri:
            peers.nbdsh("h.pwrite(b'X', 65539)", uri)
            with connect(uri) as sock:
                assert export_name(sock) == M
                assert read(sock, 64 * K, 10) == found.ljust(10, b"\0")
    assert image.read_bytes() == before


def test_a_backing_file_without_a_format(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"base".ljust(M, b"\0"))
    path = tmp_path / "top.qcow2"
    Image(size=M, backing_file="base").write(path)
    one_line(failing("-p", "0", path), 1, path, "--probe-backing")
    with serving("-p", "0", "--probe-backing", path) as uri, connect(uri) as sock:
        assert export_name(sock) == M
        assert read(sock, 0, 4) == b"base"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ("", ["IMAGE"]),
        ("--nonsense x", ["--nonsense"]),
        ("-p", ["-p"]),
        ("-p 65536 x", ["--port", "65536", "0 to 65535"]),
        ("-p -1 x", ["--port", "-1", "0 to 65535"]),
        ("-p ten x", ["--port", "'ten'", "0 to 65535"]),
        ("-e -1 x", ["--shared", "-1", "0 or more"]),
        ("-e 1.5 x", ["--shared", "1.5", "0 or more"]),
        ("-f vmdk x", ["--format", "vmdk", "raw", "qcow2"]),
        ("--handshake-limit nan x", ["--handshake-limit", "nan", "0 or more"]),
        ("--handshake-limit inf x", ["--handshake-limit", "inf", "0 or more"]),
        ("--handshake-limit -1 x", ["--handshake-limit", "-1", "0 or more"]),
        ("--handshake-limit soon x", ["--handshake-limit", "soon", "0 or more"]),
        ("-k s -p 1 x", ["--socket", "--port"]),
        ("-k s -b ::1 x", ["--socket", "--bind"]),
        ("x y", ["y"]),
        ("--discard=on x", ["--discard", "'unmap', 'ignore'"]),
        ("--detect-zeroes=all x", ["--detect-zeroes", "'off', 'on', 'unmap'"]),
        ("--detect-zeroes=unmap --discard=ignore x", ["--detect-zeroes", "--discard=unmap"]),
    ],
)
def test_arguments_that_make_no_sense(arguments: str, parts: list[str]) -> None:
    one_line(failing(*arguments.split()), 2, *parts)


@pytest.mark.parametrize(
    "option, value, parts",
    [
        ("-x", "x" * 4097, ["--export-name", 4097, 4096]),
        ("-x", b"\xff", ["--export-name", "UTF-8"]),
        ("-D", "ü" * 2049, ["--description", 4098, 4096]),
        ("-D", b"\xc3", ["--description", "UTF-8"]),
        ("-k", "/tmp/" + "x" * 103, ["--socket", 108, 107]),
        ("-k", "", ["--socket", 0, 107]),
        ("-b", "x" * 64, ["--bind", "x" * 64]),
        ("-b", "", ["--bind", "address"]),
        ("-B", "ü" * 512, ["--bitmap", 1024, 1023]),
    ],
)
def test_values_that_make_no_sense(
    disk: Path, option: str, value: str | bytes, parts: list[object]
) -> None:
    """A line that names the option and what is allowed."""
    one_line(failing(option, os.fsdecode(value), disk), 2, *parts)


def test_no_name_of_an_image() -> None:
    one_line(failing(""), 2, "IMAGE")


@pytest.mark.parametrize("name", ["nbd://localhost/", "ssh://a/b", "nbd:unix:/s"])
def test_the_name_of_something_else(name: str) -> None:
    one_line(failing(name), 2, "IMAGE", name, "protocol name, not a file")


def test_an_image_by_its_options(image: Path) -> None:
    """``json:{...}``, of the user; that of another file is refused (test_chain)."""
    options = {"driver": "qcow2", "file": {"filename": str(image)}, "backing": None}
    with serving("-p", "0", f"json:{json.dumps(options)}") as uri:
        assert "base:allocation" in info(uri)["contexts"]
    one_line(failing("json:{}"), 1, "driver or file is needed")


def test_a_file_with_a_colon(tmp_path: Path) -> None:
    """It is a file, because it is there."""
    (tmp_path / "a:b").write_bytes(bytes(M))
    with serving("-p", "0", "a:b", cwd=tmp_path) as uri, connect(uri) as sock:
        assert export_name(sock) == M
    one_line(failing("a/b:c", cwd=tmp_path), 1, "No such file")


@pytest.mark.parametrize("closed", [False, True])
def test_output_that_cannot_be_written(disk: Path, closed: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as broken:
        done = subprocess.run(
            [*PYNBD, "serve", "-p", "0", disk],
            stdout=broken if closed else full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
            check=False,
        )
    reason = "Broken pipe" if closed else "No space left on device"
    assert (done.returncode, done.stderr) == (1, f"pynbd: standard output: {reason}\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_closed_standard_descriptors(disk: Path, closed: str, loop: str) -> None:
    """Neither the image nor a client takes their place."""
    with peers.socket_path() as path:
        line = [*PYNBD, "serve", "--loop", loop, "-k", str(path), str(disk)]
        with subprocess.Popen(["bash", "-c", f'exec "$@" {closed}', "-", *line]) as process:
            deadline = time.monotonic() + 10
            while not path.is_socket() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            with connect(f"nbd+unix:///?socket={path}") as sock:
                assert export_name(sock) == M
                assert read(sock, 0, 9) == b"raw bytes"
                for name in "<&- 0", ">&- 1", "2>&- 2":
                    redirection, number = name.split()
                    if redirection in closed.split():
                        assert os.readlink(f"/proc/{process.pid}/fd/{number}") == "/dev/null"
            process.terminate()
            assert process.wait(10) == 0


def test_values_that_are_just_right(disk: Path) -> None:
    with serving("-p", "0", "-x", "ü" * 2048, "-D", "x" * 4096, disk) as uri:
        export = info(uri)
        assert (export["export-name"], export["description"]) == ("ü" * 2048, "x" * 4096)
    with peers.socket_path() as path:
        longest = f"{path}{'x' * (107 - len(str(path)))}"
        with serving("-k", longest, disk) as uri, connect(uri) as sock:
            assert greeted(sock)


def test_where_uvloop_is_missing(disk: Path) -> None:
    """asyncio's own loop serves."""
    program = "import sys; sys.modules['uvloop'] = None; from pynbd.__main__ import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "serve", "-p", "0", disk], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        with connect(process.stdout.readline()) as sock:
            assert export_name(sock) == M
        process.terminate()
        assert process.wait(10) == 0


# Socket activation -------------------------------------------------------------------------------


def activated(listeners: list[socket.socket], *args: str | Path) -> subprocess.Popen[str]:
    """Start it as systemd does: the sockets are descriptors 3 and up, and it knows its own pid."""
    # From above, where nothing else of this process is.
    lent = [fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, 100) for listener in listeners]
    spread = "; ".join(f"exec {n}<&{fd} {fd}<&-" for n, fd in enumerate(lent, 3))
    script = f'{spread}; LISTEN_PID=$$ LISTEN_FDS={len(lent)} exec "$@"'
    try:
        return subprocess.Popen(
            ["bash", "-c", script, "-", *PYNBD, "serve", *map(str, args)],
            pass_fds=lent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        for fd in lent:
            os.close(fd)


def test_socket_activation(disk: Path) -> None:
    """It says nothing, and leaves after the last client; a probe is not a client."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        first = socket.create_connection(one.getsockname(), 10)
        with activated([one, two], disk) as process:
            assert greeted(first)
            first.close()
            client = socket.create_connection(two.getsockname(), 10)
            assert export_name(client) == M
            assert read(client, 0, 9) == b"raw bytes"
            assert process.poll() is None
            client.close()
            assert process.communicate(timeout=10) == ("", "")
            assert process.returncode == 0


def test_nbdinfo_starts_it(disk: Path) -> None:
    peers.require("nbdinfo")
    said = peers.run("nbdinfo", "--size", "--", "[", *PYNBD, "serve", disk, "]").stdout
    assert said.split() == [str(M)]


def test_socket_activation_and_an_address(disk: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        activated([listener], "-p", "0", disk) as process,
    ):
        _, errors = process.communicate(timeout=10)
        one_line((process.returncode, errors), 2, "cannot be used with", "LISTEN_FDS")


def test_what_cannot_be_accepted_on(disk: Path) -> None:
    idle = socket.socket()
    with idle, activated([idle], disk) as process:
        _, errors = process.communicate(timeout=10)
        one_line((process.returncode, errors), 1, "LISTEN_FDS", "descriptor 3", "not listen")
    for redirection, reason in (("3</dev/null", "not a socket"), ("3<&-", "not open")):
        script = f'LISTEN_PID=$$ LISTEN_FDS=50 exec "$@" {redirection}'
        done = subprocess.run(
            ["bash", "-c", script, "-", *PYNBD, "serve", disk],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        line = f"LISTEN_FDS: descriptor 3 is {reason}"
        one_line((done.returncode, done.stderr), 1, line)


def test_variables_that_are_meant_for_another(disk: Path) -> None:
    environment = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    with serving("-p", "0", disk, env=environment) as uri, connect(uri) as sock:
        assert greeted(sock)


# Signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_signals_end_it(disk: Path, loop: str, number: signal.Signals) -> None:
    """With a client in transmission and one that still negotiates; at once, with status 0."""
    with started("--loop", loop, "-p", "0", disk) as server:
        client, silent = connect(server.uri), connect(server.uri)
        assert export_name(client) == M
        assert greeted(silent)
        start = time.monotonic()
        assert server.end(number) == (0, "", "")
        assert time.monotonic() - start < 1.5
        for sock in (client, silent):
            assert sock.recv(1) == b""
            sock.close()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_second_signal_ends_it_at_once(disk: Path, loop: str) -> None:
    """While the first waits for a client that takes no replies."""
    with started("--loop", loop, "-p", "0", disk) as server, connect(server.uri) as client:
        assert export_name(client) == M
        request = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, M)
        client.sendall(request * 64)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        assert server.process.poll() is None
        start = time.monotonic()
        assert server.end(signal.SIGINT) == (0, "", "")
        assert time.monotonic() - start < 0.7


UNFINISHED = (
    "ended by a second signal before it was finished: its bitmaps are not saved, and what was not"
    " flushed may be lost"
)


def write_and_take_no_replies(client: socket.socket, *, writes: bool = True) -> None:
    """The end waits for this client."""
    assert export_name(client) == M
    if writes:
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 1) + b"X")
        assert client.recv(16, socket.MSG_WAITALL)[4:8] == bytes(4)
    client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, M) * 64)
    time.sleep(0.2)


def in_use(image: Path) -> bool:
    """Whether its bitmaps are not saved."""
    line = [*PYNBD, "info", "--json", str(image)]
    told = json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)
    return any("in-use" in each["flags"] for each in told["format-specific"]["data"]["bitmaps"])


@pytest.mark.parametrize(
    "options, writes, later, status",
    [([], True, 1.1, 1), ([], True, 0.01, 0), ([], False, 1.1, 0), (["-s"], True, 1.1, 0)],
)
def test_a_second_signal_and_an_image_that_is_not_finished(
    image: Path, options: list[str], writes: bool, later: float, status: int
) -> None:
    """A status of 0 would say that its bitmaps are stored. Nobody misses an overlay's."""
    with started(*options, "-p", "0", image) as server, connect(server.uri) as client:
        write_and_take_no_replies(client, writes=writes)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(later)
        assert server.process.poll() is None
        said = f"pynbd: {image}: {UNFINISHED}\n" if status else ""
        assert server.end(signal.SIGINT) == (status, "", said)
    assert in_use(image) == bool(status)


def test_timeout_1_sends_two_signals(image: Path) -> None:
    """To its child, and then to the group that both are in."""
    line = ["timeout", "60", *PYNBD, "serve", "-p", "0", str(image)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as both:
        assert both.stdout is not None
        with connect(both.stdout.readline().strip()) as client:
            write_and_take_no_replies(client)
            both.terminate()
            assert both.communicate(timeout=20) == ("", "")
    assert both.returncode == 0
    assert not in_use(image)


def test_a_second_signal_while_nobody_reads_standard_error(image: Path) -> None:
    """What cannot be told is not waited for."""
    reading, errors = os.pipe()
    os.set_blocking(errors, False)
    with suppress(BlockingIOError):
        while True:
            os.write(errors, bytes(1 << 12))
    os.set_blocking(errors, True)
    line = [*PYNBD, "serve", "-p", "0", str(image)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True) as server:
        assert server.stdout is not None
        with connect(server.stdout.readline().strip()) as client:
            write_and_take_no_replies(client)
            server.terminate()
            time.sleep(1.1)
            server.terminate()
            assert server.wait(0.7) == 1
    os.close(reading)
    os.close(errors)


# A server that nobody can shake ------------------------------------------------------------------


def test_clients_that_come_and_go_leave_nothing(disk: Path, image: Path) -> None:
    """No word on standard error, and no descriptor."""
    stories: list[Callable[[socket.socket], object]] = [
        lambda sock: None,
        greeted,
        export_name,
        lambda sock: sock.sendall(b"GET / HTTP/1.0\r\n\r\n"),
        lambda sock: (export_name(sock), sock.send(b"\xff" * 1000)),
        lambda sock: (export_name(sock), sock.send(bytes(5))),
    ]
    with started("-p", "0", image) as server:
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        before = None
        for _ in range(3):
            for story in stories:
                with connect(server.uri) as sock:
                    story(sock)
            time.sleep(0.1)
            count = len(os.listdir(descriptors))
            before = before or count
            assert count == before
        assert server.end() == (0, "", "")
