"""One server process for each event loop, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from interop.certificates import Pki
from tests.conformance.running import RunningServer
from tests.conformance.tls import TlsServers

StartServer = Callable[..., RunningServer]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(id, ...): tests these rows of docs/protocol-support.md")


@pytest.fixture(params=["asyncio", "uvloop"], scope="session")
def loop(request: pytest.FixtureRequest) -> str:
    """The event loop of the servers."""
    return str(request.param)


@pytest.fixture(scope="session")
def shared_server(loop: str) -> Iterator[RunningServer]:
    with TemporaryDirectory(prefix="pynbd-") as folder:
        server = RunningServer(Path(folder), loop)
        yield server
        server.stop()


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The server that all tests share. After each test the next client is served, and nothing
    unexpected was said.
    """
    yield shared_server
    shared_server.check()
    assert shared_server.unexpected_lines() == []


@pytest.fixture
def start_server(loop: str) -> Iterator[StartServer]:
    """Starts a server with options of its own, which ends with the test."""
    with TemporaryDirectory(prefix="pynbd-") as folder:
        started: list[RunningServer] = []

        def start(*options: str) -> RunningServer:
            place = Path(folder, str(len(started)))
            place.mkdir()
            started.append(RunningServer(place, loop, options))
            return started[-1]

        yield start
        for server in started:
            if server.process.poll() is None:
                server.stop()


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def shared_tls(loop: str, pki: Pki) -> Iterator[TlsServers]:
    with TemporaryDirectory(prefix="pynbd-") as folder:
        servers = TlsServers(Path(folder), loop, pki)
        yield servers
        servers.stop()


@pytest.fixture
def tls(shared_tls: TlsServers) -> Iterator[TlsServers]:
    """Servers with TLS. After each test the next client is served, and nothing odd was said."""
    yield shared_tls
    shared_tls.check()


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
