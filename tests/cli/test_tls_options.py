"""``pynbd serve`` with TLS and rules: what goes together, and what its users and clients get."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from interop.certificates import PASSWORD, USERS, Pki
from pynbd.cli.complaints import said_of
from pynbd.cli.serve import serve
from pynbd.cli.signals import ONE_REQUEST
from pynbd.cli.tls_options import TlsOptions, tls_options_of
from pynbd.errors import PynbdError, UsageError
from pynbd.tls.credentials import HAS_PSK
from tests.cli.test_serve import PYNBD, failing, greeted, one_line, serving, started

M = 1 << 20
X509 = "tls-creds-x509,id=t,endpoint=server,dir="

psk_only = pytest.mark.skipif(not HAS_PSK, reason="TLS-PSK needs Python 3.13")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"raw bytes".ljust(M, b"\xaa"))
    return path


@pytest.fixture
def throwaway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private directories are made."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


# What goes together ------------------------------------------------------------------------------


def options(*args: str) -> TlsOptions:
    """What click makes of a command line."""
    return tls_options_of(serve.make_context("test", [*args, "disk"]).params)


BOTH = "--object, --tls-creds and --tls-authz exclude --tls-certificates, --tls-psk and"


@pytest.mark.parametrize(
    "args, says",
    [
        ("--tls-certificates d --tls-creds t", BOTH),
        ("--tls-psk f --object secret,id=s,data=x", BOTH),
        ("--tls-verify-peer --tls-creds t", BOTH),
        ("--tls-certificates d --tls-authz a", BOTH),
        ("--tls=off --tls-certificates d", "--tls=off: it goes with no other option of TLS"),
        ("--tls=off --tls-psk f", "--tls=off: it goes"),
        ("--tls=off --tls-creds t", "--tls=off: it goes"),
        ("--tls=off --object secret,id=s,data=x", "--tls=off: it goes"),
        ("--tls=off --tls-verify-peer", "--tls=off: it goes"),
        ("--tls=auto --tls-certificates d", "--tls=auto: it goes"),
        ("--tls=auto --tls-creds t", "--tls=auto: it goes"),
        (
            "--tls=on",
            (
                "--tls=on: it needs --tls-certificates DIR, --tls-psk FILE, or --object and"
                " --tls-creds ID; --tls=auto makes credentials"
            ),
        ),
        ("--tls=require", "--tls=require: it needs --tls-certificates DIR"),
        ("--tls=require --object secret,id=s,data=x", "--tls=require: it needs"),
        ("--tls-verify-peer", "--tls-verify-peer: it needs --tls-certificates DIR"),
        ("--tls-verify-peer --tls-psk f", "--tls-verify-peer: it needs --tls-certificates DIR"),
        ("--tls-authz a", "--tls-authz: it needs --tls-creds ID"),
        ("--object secret,id=s,data=x", "--object: nothing uses it; --tls-creds ID does"),
        ("--allow read --access f", "--allow excludes --access"),
    ],
)
def test_no_sense(args: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        options(*args.split()).check(activated=False)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    "args",
    [
        "",
        "--tls=off",
        "--tls=off --allow read",
        "--tls=auto",
        "--tls=on --tls-certificates d",
        "--tls=require --tls-certificates d --tls-psk f --tls-verify-peer",
        "--tls=on --object x --tls-creds t --tls-authz a",
        "--access f",
    ],
)
def test_sense(args: str) -> None:
    options(*args.split()).check(activated=False)


def test_activated() -> None:
    options("--tls-certificates", "d").check(activated=True)
    with pytest.raises(UsageError, match="--tls=auto: not with socket activation"):
        options("--tls=auto").check(activated=True)


@pytest.mark.parametrize(
    "args, mode",
    [("", True), ("--tls=require", True), ("--tls=on", False)],
)
@pytest.mark.parametrize("family", ["nbdkit", "qemu"])
def test_modes(args: str, mode: bool, family: str, pki: Pki) -> None:
    given = {
        "nbdkit": ["--tls-certificates", str(pki.server)],
        "qemu": ["--object", f"{X509}{pki.server}", "--tls-creds", "t"],
    }
    wanted = options(*args.split(), *given[family])
    with wanted.opened("", path=None, host="localhost", activated=False) as security:
        assert security.tls is not None
        assert security.tls.required is mode
        # QEMU's credentials verify clients, nbdkit's do not.
        assert security.tls.credentials.verify_peer is (family == "qemu")


WITH_CERTIFICATES = ["--tls-certificates={}", "--tls-verify-peer"]


@pytest.mark.parametrize(
    "args, warned",
    [
        (["--tls=on", *WITH_CERTIFICATES], True),
        (["--tls=on", f"--object={X509}{{}}", "--tls-creds=t"], True),
        (["--tls=on", *WITH_CERTIFICATES, "--allow=read", "--allow=write,cert=alice"], False),
        pytest.param(["--tls=on", "--tls-psk={}/../psk"], True, marks=psk_only),
        (["--tls=on", WITH_CERTIFICATES[0]], False),
        (["--tls=require", *WITH_CERTIFICATES], False),
        (WITH_CERTIFICATES, False),
    ],
)
def test_clients_who_are_looked_at_only_in_tls(
    args: list[str], warned: bool, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has no certificate comes in clear: nobody wants that who asks for certificates."""
    wanted = options(*(arg.format(pki.server) for arg in args))
    with wanted.opened("", path=None, host="localhost", activated=False):
        said = [record.message for record in caplog.records]
    assert [text.startswith("--tls=on: whom TLS keeps out") for text in said] == [True] * warned


def test_in_clear() -> None:
    for args in ([], ["--tls=off"]):
        with options(*args).opened("", path=None, host="::1", activated=False) as security:
            assert (security.tls, security.access) == (None, None)


def error_of(*args: str | Path) -> str:
    """What it says when it cannot open what it was given."""
    wanted = options(*map(str, args))
    wanted.check(activated=False)
    with (
        pytest.raises((PynbdError, OSError)) as caught,
        wanted.opened("", path=None, host="localhost", activated=False),
    ):
        pass
    assert isinstance(caught.value, PynbdError | OSError)
    said = said_of(caught.value)
    assert "\n" not in said
    return said


def test_what_is_wrong_with_its_files(pki: Pki, tmp_path: Path) -> None:
    certificate = tmp_path / "server-cert.pem"
    assert error_of("--tls-certificates", tmp_path).startswith(f"{certificate}: ")
    assert "server-cert.pem: " in error_of("--tls-certificates", pki.expired_server)
    assert error_of("--access", tmp_path / "none").startswith(f"{tmp_path / 'none'}: ")
    secret = ["--object", "secret,id=s,file=/none"]
    assert error_of(*secret, "--tls-creds", "s").startswith("/none: ")


def test_what_is_wrong_with_its_objects(pki: Pki) -> None:
    x509 = ["--object", f"{X509}{pki.server}"]
    assert "'u'; there is t" in error_of(*x509, "--tls-creds", "u")
    args = [*x509, "--tls-creds=t", "--tls-authz=a"]
    assert "no object 'a'" in error_of(*args)
    authz = ["--object", "authz-simple,id=a,identity=x"]
    args[1] += ",verify-peer=off"
    assert error_of(*args, *authz).startswith("--tls-authz: it is for certificates of clients")


@psk_only
def test_keys_are_no_certificates(pki: Pki) -> None:
    psk = ["--object", f"tls-creds-psk,id=t,endpoint=server,dir={pki.psk.parent}"]
    args = [*psk, "--tls-creds=t", "--tls-authz=a", "--object", "authz-simple,id=a,identity=x"]
    assert error_of(*args).startswith("--tls-authz: it is for certificates of clients")


@psk_only
def test_a_user_without_a_key(pki: Pki) -> None:
    said = error_of("--tls-psk", pki.psk, "--allow", "read,psk=carol")
    assert said.startswith("--allow 'read,psk=carol': ")
    assert "alice" in said


@pytest.mark.skipif(HAS_PSK, reason="this Python has TLS-PSK")
def test_keys_need_a_newer_python(pki: Pki) -> None:
    assert error_of("--tls-psk", pki.psk).startswith("TLS-PSK needs Python 3.13 or later")


# As users start it -------------------------------------------------------------------------------


def told(uri: str) -> dict[str, Any]:
    """What nbdinfo says of the server."""
    peers.require("nbdinfo")
    said: dict[str, Any] = json.loads(peers.run("nbdinfo", "--json", uri).stdout)
    return said


def refused(uri: str) -> str:
    """What nbdinfo says when it is refused."""
    done = peers.run("nbdinfo", "--size", uri, check=False)
    assert done.returncode != 0
    return done.stderr


def with_(uri: str, certificates: Path) -> str:
    """The URI as a client with these certificates writes it."""
    return f"{uri}{'&' if '?' in uri else '?'}tls-certificates={certificates}"


@pytest.mark.parametrize("family", ["nbdkit", "qemu"])
def test_certificates(family: str, pki: Pki, disk: Path) -> None:
    args: list[str | Path] = ["--tls-certificates", pki.server, "--tls-verify-peer"]
    if family == "qemu":
        args = ["--object", f"{X509}{pki.server}", "--tls-creds", "t"]
    with serving("-p", "0", "-x", "disk", *args, disk) as uri:
        assert re.fullmatch(r"nbds://localhost:\d+/disk", uri)
        assert told(with_(uri, pki.client()))["TLS"]
        refused(with_(uri, pki.anonymous))
        refused(uri.replace("nbds", "nbd"))


def test_what_qemu_says_of_its_objects(pki: Pki, disk: Path) -> None:
    args = ["--object", f"secret,id=s,data={PASSWORD}", "--tls-creds", "t"]
    args += ["--object", f"{X509}{pki.encrypted},passwordid=s,verify-peer=off"]
    with serving("-p", "0", *args, disk) as uri:
        assert told(with_(uri, pki.anonymous))["TLS"]


def test_authorisation(pki: Pki, disk: Path) -> None:
    pki.client("bob")
    args = ["--object", f"{X509}{pki.server}", "--tls-creds", "t", "--tls-authz", "a"]
    args += ["--object", "authz-list,id=a,rules.0.match=*CN=alice*,rules.0.policy=allow"]
    args[-1] += ",rules.0.format=glob"
    with serving("-p", "0", *args, disk) as uri:
        assert told(with_(uri, pki.client()))["TLS"]
        refused(with_(uri, pki.client("bob")))


def test_on_leaves_the_choice_to_the_client(pki: Pki, disk: Path) -> None:
    args = ["--tls=on", "--tls-certificates", str(pki.server)]
    rules = ["--allow=read", "--allow=write,tls=on"]
    with serving("-p", "0", *args, *rules, disk) as uri:
        assert uri.startswith("nbds://")
        said = told(with_(uri, pki.anonymous))
        assert (said["TLS"], said["exports"][0]["is_read_only"]) == (True, False)
        said = told(uri.replace("nbds", "nbd"))
        assert (said["TLS"], said["exports"][0]["is_read_only"]) == (False, True)


@psk_only
@pytest.mark.parametrize("family", ["nbdkit", "qemu"])
def test_keys(family: str, pki: Pki, disk: Path) -> None:
    user = next(iter(USERS))
    args: list[str | Path] = ["--tls-psk", pki.psk]
    if family == "qemu":
        args = ["--object", f"tls-creds-psk,id=t,endpoint=server,dir={pki.psk.parent}"]
        args += ["--tls-creds", "t"]
    with peers.socket_path() as path, serving("-k", path, *args, disk) as uri:
        assert uri == f"nbds+unix://{user}@/?socket={path}&tls-psk-file={pki.psk}"
        assert told(uri)["TLS"]
        refused(uri.replace(str(pki.psk), str(pki.wrong_psk)))


def test_auto(disk: Path, throwaway: Path, tmp_path: Path) -> None:
    """What is printed is what clients type."""
    clients(throwaway, tmp_path, "-p", "0", "-x", "it's, a disk", disk)


def test_auto_on_a_unix_socket(disk: Path, throwaway: Path, tmp_path: Path) -> None:
    with peers.socket_path() as path:
        clients(throwaway, tmp_path, "-k", path, disk)


def clients(throwaway: Path, folder: Path, *args: str | Path) -> None:
    peers.require("nbdinfo", "nbdcopy", "qemu-img")
    path = folder / "bin"
    path.mkdir()
    for name in ("nbdinfo", "nbdcopy", "qemu-img"):
        (path / name).symlink_to(peers.find(name))
    with started("--tls=auto", *args) as server:
        assert told(server.uri)["TLS"]
        refused(re.sub(r"[?&]tls-certificates=.*", "", server.uri))
        (private,) = throwaway.iterdir()
        assert private.stat().st_mode & 0o777 == 0o700
        assert server.process.stdout is not None
        lines = [server.process.stdout.readline().rstrip("\n") for _ in range(5 if HAS_PSK else 3)]
        programs = ["nbdinfo", "nbdcopy", "qemu-img", "nbdinfo", "qemu-img"]
        assert [shlex.split(line)[0] for line in lines] == programs[: len(lines)]
        for line in lines:
            done = subprocess.run(
                ["sh", "-c", line],
                cwd=folder,
                env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, (line, done.stderr)
        assert (folder / "copy.img").read_bytes() == (folder / "disk.raw").read_bytes()
        assert server.end() == (0, "", "")
    assert list(throwaway.iterdir()) == []


def test_auto_is_gone_when_the_start_fails(tmp_path: Path, throwaway: Path) -> None:
    one_line(failing("--tls=auto", "-p", "0", tmp_path / "none"), 1, "none")
    assert list(throwaway.iterdir()) == []


def test_auto_is_gone_when_a_second_signal_ends_it_at_once(disk: Path, throwaway: Path) -> None:
    """While the first waits for a client that takes no replies."""
    with started("--tls=auto", "-p", "0", disk) as server:
        (private,) = throwaway.iterdir()
        context = ssl.create_default_context(cafile=private / "ca-cert.pem")
        context.load_cert_chain(private / "client-cert.pem", private / "client-key.pem")
        match = re.search(r":(\d+)/", server.uri)
        assert match
        with socket.create_connection(("localhost", int(match[1])), 10) as clear:
            assert greeted(clear)
            clear.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 5, 0))  # STARTTLS
            assert clear.recv(20, socket.MSG_WAITALL)[12:16] == struct.pack(">I", 1)  # ACK
            with context.wrap_socket(clear, server_hostname="localhost") as client:
                client.sendall(struct.pack(">8sII", b"IHAVEOPT", 1, 0))  # EXPORT_NAME
                assert client.recv(10)[:8] == struct.pack(">Q", M)
                client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, M) * 64)
                time.sleep(0.2)
                server.process.send_signal(signal.SIGTERM)
                time.sleep(ONE_REQUEST + 0.1)
                assert server.process.poll() is None
                status, _, errors = server.end(signal.SIGINT)
                assert (status, errors) == (0, "")
    assert list(throwaway.iterdir()) == []


def test_auto_is_gone_when_a_signal_comes_while_it_is_made(disk: Path, throwaway: Path) -> None:
    """At whatever moment: there is only a place for it, the directory, or some files, or all."""
    for files in (0, 1, 3, 5) * 2:
        line = [*PYNBD, "serve", "--tls=auto", "-p", "0", str(disk)]
        with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
            while not any(throwaway.iterdir()) or len([*throwaway.glob("*/*")]) < files:
                assert process.poll() is None
                time.sleep(0.0005)
            process.terminate()
            assert process.wait(20) == 0
        assert list(throwaway.iterdir()) == []


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "access.toml"
    path.write_text("")
    return path


def test_a_file_of_rules_with_a_user(disk: Path, rules: Path) -> None:
    peers.require("nbdinfo")
    rules.write_text(f'[exports.d]\nallow = [{{ right = "read", uid = {os.getuid()} }}]')
    with (
        peers.socket_path() as path,
        serving("-k", path, "-x", "d", "--access", rules, disk) as uri,
    ):
        assert told(uri)["exports"][0]["is_read_only"]
    rules.write_text(f'[exports.d]\nallow = [{{ right = "read", uid = {os.getuid() + 1} }}]')
    with (
        peers.socket_path() as path,
        serving("-k", path, "-x", "d", "--access", rules, disk) as uri,
    ):
        assert "export" in refused(uri)


def test_a_file_of_rules_with_addresses(disk: Path, rules: Path) -> None:
    peers.require("nbdinfo")
    rules.write_text(
        '[exports.""]\nallow = [\n    { right = "write", address = "127.0.0.0/8" },\n'
        '    { right = "read", gid = "root", tls = false },  # nobody comes over a unix socket\n]\n'
    )
    said = failing("-b", "127.0.0.1", "-p", "0", "--access", rules, disk)
    one_line(said, 2, f'{rules}: [exports.""]: allow: rule 2: nobody could meet it: uid and gid')
    rules.write_text('[exports.""]\nallow = [{ right = "write", address = "127.0.0.0/8" }]')
    with serving("-b", "127.0.0.1", "-p", "0", "--access", rules, disk) as uri:
        assert not told(uri)["exports"][0]["is_read_only"]
    rules.write_text('[exports.""]\nallow = [{ right = "write", address = "127.0.0.2" }]')
    with serving("-b", "127.0.0.1", "-p", "0", "--access", rules, disk) as uri:
        assert "export" in refused(uri)


def test_rules_of_names_in_certificates(pki: Pki, disk: Path) -> None:
    pki.client("bob")
    args: list[str | Path] = ["--tls-certificates", pki.server, "--tls-verify-peer"]
    args += ["--allow", "write,cert=alice", "--allow", "read,dn=*CN=bob*"]
    with serving("-p", "0", *args, disk) as uri:
        for name, reads_only in (("alice", False), ("bob", True)):
            said = told(with_(uri, pki.client(name)))
            assert said["exports"][0]["is_read_only"] is reads_only
        refused(with_(uri, pki.client("carol")))


@psk_only
def test_rules_of_users_of_keys(pki: Pki, disk: Path) -> None:
    args: list[str | Path] = ["--tls-psk", pki.psk, "--allow", "read", "--allow", "write,psk=bob"]
    with serving("-p", "0", *args, disk) as uri:
        for name, reads_only in (("alice", True), ("bob", False)):
            said = told(uri.replace("alice@", f"{name}@"))
            assert said["exports"][0]["is_read_only"] is reads_only


def test_rules_for_nobody(disk: Path, rules: Path) -> None:
    rules.write_text("[exports.d]\nallow = []")
    warning = "pynbd: export 'd': no rule lets anybody in\n"
    with serving("-p", "0", "-x", "d", "--access", rules, disk, errors=warning) as uri:
        assert "export" in refused(uri)


def test_whom_the_rules_keep_out_is_told_with_v(disk: Path) -> None:
    """Only the log says that the export is there."""
    peers.require("nbdinfo")
    with peers.socket_path() as path:
        rule = f"write,uid={os.getuid() + 1}"
        with started("-v", "-k", path, "-x", "d", "--allow", rule, disk) as server:
            refused(server.uri)
            refused(server.uri.replace("/d?", "/e?"))
            status, _, errors = server.end()
    assert status == 0
    assert set(errors.splitlines()) == {
        "pynbd: a local client asked for export 'd', which no rule lets it have",
        "pynbd: a local client asked for export 'e', which is not there",
    }


def test_secrets_are_logged_for_wireshark(pki: Pki, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "keys.log"
    environment = {**os.environ, "SSLKEYLOGFILE": str(log)}
    with serving("-p", "0", "--tls-certificates", pki.server, disk, env=environment) as uri:
        told(with_(uri, pki.anonymous))
    assert "SERVER_TRAFFIC_SECRET_0" in log.read_text()
