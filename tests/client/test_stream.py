"""The socket of a connection: how it is opened, and what is sent in which pieces."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from pathlib import Path

import pytest

from interop.certificates import Pki
from pynbd.client.stream import Stream, open_socket
from pynbd.errors import TlsError
from pynbd.protocol.uri import NbdUri

MIB = 1 << 20


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """A unix socket has room for one more than its backlog, and then says EAGAIN."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        uri = NbdUri.parse(f"nbd+unix:///?socket={tmp_path}/s")
        first = await open_socket(uri)
        waiting = asyncio.ensure_future(open_socket(uri))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        accepted, _ = listener.accept()
        (await waiting).close()
        accepted.close()
        first.close()


async def test_an_abstract_name() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0pynbd-test-stream")
        listener.listen()
        (await open_socket(NbdUri.parse("nbd+unix:///?socket=%00pynbd-test-stream"))).close()


async def test_every_address_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (await open_socket(NbdUri.parse(f"nbd://localhost:{port}"))).close()


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "\xe4" * 63])
async def test_names_that_no_host_can_have(host: str) -> None:
    with pytest.raises(OSError, match="no host can have this name"):
        await open_socket(NbdUri(host=host))


async def test_vsock() -> None:
    """The loopback of AF_VSOCK, context 1, where the kernel has it."""
    with socket.socket(socket.AF_VSOCK) as listener:
        try:
            listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            listener.listen()
        except OSError as error:
            pytest.skip(f"no vsock: {error}")
        port = listener.getsockname()[1]
        try:
            async with asyncio.timeout(0.5):  # it is there at once, or not at all
                sock = await open_socket(NbdUri.parse(f"nbd+vsock://1:{port}/"))
        except OSError as error:
            pytest.skip(f"no vsock loopback: {error}")
        sock.close()


async def test_thousands_of_pieces_arrive_in_order() -> None:
    """More pieces than one call takes, and more bytes than the socket holds."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    stream = Stream(ours)
    pieces = [hashlib.shake_128(bytes([n % 251])).digest(n % 3000) for n in range(5000)]
    lost: list[OSError] = []
    stream.start(lambda: None, lost.append)
    stream.send(*pieces[:2000])
    stream.send(*pieces[2000:])
    draining = asyncio.ensure_future(stream.drain())
    expected = b"".join(pieces)
    received = bytearray()
    while len(received) < len(expected):
        received += await asyncio.get_running_loop().sock_recv(theirs, MIB)
    await draining
    assert received == expected
    stream.close()
    stream.close()
    theirs.close()
    assert not lost


async def test_a_lost_peer_is_told_once() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    lost: list[OSError] = []
    stream.start(lambda: None, lost.append)
    theirs.close()
    stream.send(b"x", b"y")
    await stream.drain()
    assert [type(error) for error in lost] == [BrokenPipeError]
    stream.close()


async def test_the_last_word_of_a_server_that_has_gone(tmp_path: Path) -> None:
    """It has refused the client's certificate, and then the client writes."""
    pki = Pki.make(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki.server / "ca-cert.pem")
    context.load_cert_chain(pki.server / "server-cert.pem", pki.server / "server-key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    ours, theirs = socket.socketpair()

    def refuse() -> None:
        with theirs, pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            context.wrap_socket(theirs, server_side=True)

    refusing = asyncio.create_task(asyncio.to_thread(refuse))
    stream = Stream(ours)
    trusting = ssl.create_default_context(cafile=pki.anonymous / "ca-cert.pem")
    await stream.start_tls(trusting, "localhost")
    await refusing
    with pytest.raises(TlsError, match="the peer says 'certificate required'"):
        await stream.write(b"IHAVEOPT")
    stream.close()
