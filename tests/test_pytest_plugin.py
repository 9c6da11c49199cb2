"""The fixture `nbd_server`, in test suites of its users."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import pynbd

pytest_plugins = ["pytester"]

# An installed pynbd is found by its entry point.
INSTALLED = any(point.value == "pynbd.pytest_plugin" for point in entry_points(group="pytest11"))
PLUGINS = () if INSTALLED else ("-p", "pynbd.pytest_plugin")

SYNC = """
    import socket
    from urllib.parse import parse_qs, urlsplit

    def connected(uri):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(parse_qs(urlsplit(uri).query)["socket"][0])
        return sock

    def transmitting(uri, name=b""):
        sock = connected(uri)
        assert sock.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\\0\\3"
        sock.sendall(b"\\0\\0\\0\\3IHAVEOPT\\0\\0\\0\\1" + len(name).to_bytes(4, "big") + name)
        return sock, int.from_bytes(sock.recv(10, socket.MSG_WAITALL)[:8], "big")

    def request(sock, command, offset, data=b"", length=0):
        head = b"\\x25\\x60\\x95\\x13\\0\\0" + command.to_bytes(2, "big") + b"COOKIEES"
        length = len(data) or length
        sock.sendall(head + offset.to_bytes(8, "big") + length.to_bytes(4, "big") + data)
        reply = sock.recv(16, socket.MSG_WAITALL)
        return int.from_bytes(reply[4:8], "big")
"""


def outcomes(pytester: pytest.Pytester, tests: str, *args: str) -> pytest.RunResult:
    """Of a run in a process of its own: numpy cannot be imported anew in this one."""
    pytester.makepyfile(nbd=SYNC, test_it=tests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(pynbd.__file__).parents[1]))
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *PLUGINS, *args, timeout=60)


def test_sync_tests(pytester: pytest.Pytester) -> None:
    """They need no pytest-asyncio."""
    (pytester.path / "disk.raw").write_bytes(b"raw" + bytes(1021))
    tests = """
        import pynbd
        import pytest
        from nbd import request, transmitting

        def test_a_file(nbd_server):
            sock, size = transmitting(nbd_server("disk.raw", format="raw", read_only=True))
            with sock:
                assert size == 1024
                assert request(sock, 0, 0, length=3) == 0
                assert sock.recv(3) == b"raw"
                assert request(sock, 1, 0, b"x") == 1

        def test_in_memory(nbd_server):
            first, second = nbd_server(size=1 << 20), nbd_server(b"content")
            assert first != second
            for uri, expected in ((first, 1 << 20), (second, 7)):
                sock, size = transmitting(uri)
                with sock:
                    assert size == expected
                    assert request(sock, 1, 0, b"x") == 0

        class Zeroes(pynbd.Disk):
            size = 512
            async def pread(self, offset, length):
                return bytes(length)

        def test_a_disk(nbd_server):
            sock, size = transmitting(nbd_server(Zeroes(), export_name="z"), b"z")
            with sock:
                assert size == 512

        def test_nothing_is_started(nbd_server):
            with pytest.raises(TypeError, match="either an image or size="):
                nbd_server()
            with pytest.raises(pynbd.ImageError, match="nonexistent"):
                nbd_server("nonexistent.raw", format="raw")
            with pytest.raises(pynbd.UsageError, match="socket excludes host"):
                nbd_server("disk.raw", socket="s", host="localhost")
    """
    outcomes(pytester, tests, "-W", "error", "-p", "no:asyncio").assert_outcomes(passed=4)


def test_an_async_test(pytester: pytest.Pytester) -> None:
    tests = """
        import asyncio
        import pytest

        @pytest.mark.asyncio
        async def test_it(nbd_server):
            uri = nbd_server(size=512, host="127.0.0.1", port=0)
            port = int(uri.rpartition(":")[2].strip("/"))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\\0\\3"
            writer.close()
            await writer.wait_closed()
    """
    result = outcomes(pytester, tests, "-o", "asyncio_default_fixture_loop_scope=function")
    result.assert_outcomes(passed=1)


def test_the_servers_end_with_their_test(pytester: pytest.Pytester) -> None:
    tests = """
        import threading
        import pytest
        from nbd import connected

        uris = []

        def test_first(nbd_server):
            uris.append(nbd_server(size=512))
            connected(uris[0]).close()

        def test_second():
            with pytest.raises(FileNotFoundError):
                connected(uris[0])
            assert not [t for t in threading.enumerate() if t.name.startswith("pynbd")]
    """
    outcomes(pytester, tests, "-p", "no:randomly").assert_outcomes(passed=2)


def test_errors_of_the_server_fail_the_test(pytester: pytest.Pytester) -> None:
    tests = """
        import pynbd
        from nbd import request, transmitting

        class Broken(pynbd.Disk):
            size = 512
            async def pread(self, offset, length):
                raise KeyError("broken")

        def test_unseen(nbd_server):
            sock, _ = transmitting(nbd_server(Broken()))
            with sock:
                assert request(sock, 0, 0, length=1) == 5

        def test_wanted(nbd_server):
            test_unseen(nbd_server)
            assert "KeyError: 'broken'" in nbd_server.errors[0]
            nbd_server.errors.clear()
    """
    result = outcomes(pytester, tests)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["the server has logged errors:", "Broken: a defect in pread:", "*KeyError: 'broken'"]
    )


def test_a_disk_that_cannot_be_closed(pytester: pytest.Pytester) -> None:
    tests = """
        import pynbd

        class Clinging(pynbd.Disk):
            size = 512
            async def pread(self, offset, length):
                return bytes(length)
            async def close(self):
                raise OSError(5, "it does not let go")

        def test_it(nbd_server):
            nbd_server(Clinging())
    """
    result = outcomes(pytester, tests)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*it does not let go"])


def test_it_costs_little_to_have_it() -> None:
    program = (
        "import pynbd.pytest_plugin, sys;"
        "sys.exit(not {'numpy', 'uvloop', 'pynbd.server'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0
