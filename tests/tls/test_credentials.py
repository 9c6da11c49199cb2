"""Who gets through: handshakes between a server's and a client's credentials."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest

from interop.certificates import PASSWORD, USERS, Authority, Pki
from pynbd.errors import TlsError, UsageError
from pynbd.tls import credentials
from pynbd.tls.credentials import MAX_SESSIONS, ServerCredentials, client_context
from pynbd.tls.names import CertificateNames
from tests.tls.handshakes import TLS_1_2, TLS_1_3, Ends, only, shake

both_versions = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["1.2", "1.3"])
with_psk = pytest.mark.skipif(not credentials.HAS_PSK, reason="PSK needs Python 3.13")


def nobody(user: str) -> None:
    raise AssertionError(f"{user} has no part in this")


def talk(
    server: ServerCredentials, version: ssl.TLSVersion, hostname: str = "localhost", **client: Any
) -> Ends:
    return shake(only(client_context(**client), version), server.context(nobody), hostname)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of somebody who is not root."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    return tmp_path


@both_versions
@pytest.mark.parametrize("hostname", ["localhost", "127.0.0.1", "::1"])
def test_server_is_who_it_says(pki: Pki, version: ssl.TLSVersion, hostname: str) -> None:
    server = ServerCredentials(certificates=pki.server)
    ends = talk(server, version, hostname, certificates=str(pki.anonymous))
    assert ends.client.version() == {TLS_1_2: "TLSv1.2", TLS_1_3: "TLSv1.3"}[version]
    assert ends.server.getpeercert(binary_form=True) is None


@both_versions
@pytest.mark.parametrize("which", ["rsa", "server_with_chain"])
def test_other_kinds_of_servers(pki: Pki, version: ssl.TLSVersion, which: str) -> None:
    server = ServerCredentials(certificates=getattr(pki, which))
    talk(server, version, certificates=str(pki.anonymous))


@both_versions
def test_encrypted_key(pki: Pki, version: ssl.TLSVersion) -> None:
    server = ServerCredentials(certificates=pki.encrypted, key_password=PASSWORD)
    talk(server, version, certificates=str(pki.anonymous))
    assert PASSWORD not in repr(server) + repr(vars(server))


def test_a_password_that_is_not_needed(pki: Pki) -> None:
    ServerCredentials(certificates=pki.server, key_password=PASSWORD)


@both_versions
@pytest.mark.parametrize(
    "which, hostname, says",
    [
        ("misnamed_server", "localhost", "Hostname mismatch"),
        ("misnamed_server", "127.0.0.1", "IP address mismatch"),
        ("other_server", "localhost", "unable to get local issuer"),
    ],
)
def test_server_that_is_refused(
    pki: Pki, version: ssl.TLSVersion, which: str, hostname: str, says: str
) -> None:
    server = ServerCredentials(certificates=getattr(pki, which))
    with pytest.raises(ssl.SSLCertVerificationError, match=says):
        talk(server, version, hostname, certificates=str(pki.anonymous))
    talk(server, version, hostname, certificates=str(pki.anonymous), verify_peer=False)


def test_expired_server_is_refused_by_the_client(pki: Pki) -> None:
    """It could not be made: the certificate must expire while the server runs."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    folder = pki.expired_server
    server.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake(client_context(certificates=str(pki.anonymous)), server)


@both_versions
def test_client_shows_a_certificate(pki: Pki, version: ssl.TLSVersion) -> None:
    server = ServerCredentials(certificates=pki.server, verify_peer=True)
    shown = talk(server, version, certificates=str(pki.client("alice"))).server
    der = shown.getpeercert(binary_form=True)
    assert der
    names = CertificateNames.of(der)
    assert names == CertificateNames("C=GB,ST=Essex,L=Colchester,O=Example,CN=alice", ("alice",))


@both_versions
def test_client_with_a_chain(pki: Pki, version: ssl.TLSVersion) -> None:
    server = ServerCredentials(certificates=pki.server, verify_peer=True)
    talk(server, version, certificates=str(pki.client_with_chain))


@both_versions
@pytest.mark.parametrize(
    "which, says",
    [
        ("anonymous", "did not return a certificate"),
        ("other_client", "unable to get local issuer"),
        ("misused_client", "unsuitable certificate purpose|unsupported certificate purpose"),
        ("revoked", "certificate revoked"),
    ],
)
def test_client_that_is_refused(pki: Pki, version: ssl.TLSVersion, which: str, says: str) -> None:
    server = ServerCredentials(certificates=pki.server_with_crl, verify_peer=True)
    with pytest.raises(ssl.SSLError, match=says):
        talk(server, version, certificates=str(getattr(pki, which)))
    talk(server, version, certificates=str(pki.client("alice")))


def test_client_whose_certificate_has_expired(pki: Pki) -> None:
    client = only(ssl.create_default_context(cafile=pki.expired_client / "ca-cert.pem"), TLS_1_2)
    client.load_cert_chain(
        pki.expired_client / "client-cert.pem", pki.expired_client / "client-key.pem"
    )
    server = ServerCredentials(certificates=pki.server, verify_peer=True)
    with pytest.raises(ssl.SSLError, match="certificate has expired"):
        shake(client, server.context(nobody))


def test_client_that_looks_at_a_list_of_revoked_certificates(pki: Pki, tmp_path: Path) -> None:
    shutil.copytree(pki.anonymous, tmp_path, dirs_exist_ok=True)
    bad = pki.ca.issue("localhost", "server", hosts=["localhost"])
    (tmp_path / "ca-crl.pem").write_bytes(pki.ca.crl(bad))
    talk(ServerCredentials(certificates=pki.server), TLS_1_3, certificates=str(tmp_path))
    bad.store(tmp_path, "server")
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        talk(ServerCredentials(certificates=tmp_path), TLS_1_3, certificates=str(tmp_path))


def test_revoked_authority(pki: Pki, tmp_path: Path) -> None:
    """With a list of each authority, the one of the root counts, too."""
    between = Authority("Intermediate", pki.ca)
    shutil.copytree(pki.server, tmp_path, dirs_exist_ok=True)
    alice, client = between.issue("alice", "client"), tmp_path / "client"
    shutil.copytree(pki.anonymous, client)
    alice.store(client, "client")

    def allowed(*lists: bytes) -> None:
        (tmp_path / "ca-crl.pem").write_bytes(b"".join(lists))
        server = ServerCredentials(certificates=tmp_path, verify_peer=True)
        talk(server, TLS_1_3, certificates=str(client))

    allowed(between.crl())
    allowed(between.crl(), pki.ca.crl())
    with pytest.raises(ssl.SSLError, match="unable to get certificate CRL"):
        allowed(pki.ca.crl())
    with pytest.raises(ssl.SSLError, match="certificate revoked"):
        allowed(between.crl(), pki.ca.crl(between.itself()))


def test_an_intermediate_authority_may_be_the_trusted_one(pki: Pki, tmp_path: Path) -> None:
    """As for GnuTLS: nothing above it needs to be known."""
    between = Authority("Intermediate", pki.ca)
    (tmp_path / "ca-cert.pem").write_bytes(between.pem())
    server = between.issue("localhost", "server", hosts=["localhost"])
    server.store(tmp_path, "server")
    talk(ServerCredentials(certificates=tmp_path), TLS_1_3, certificates=str(tmp_path))


def test_no_authority_is_needed_to_show_a_certificate(pki: Pki, tmp_path: Path) -> None:
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(pki.server / name, tmp_path)
    (tmp_path / "ca-cert.pem").write_bytes(b"nobody looks at it")
    talk(ServerCredentials(certificates=tmp_path), TLS_1_3, certificates=str(pki.anonymous))


def test_files_are_read_once(pki: Pki, tmp_path: Path) -> None:
    folder = shutil.copytree(pki.server, tmp_path / "server")
    server = ServerCredentials(certificates=folder, verify_peer=True)
    shutil.rmtree(folder)
    talk(server, TLS_1_3, certificates=str(pki.client("alice")))
    assert server.context(nobody) is server.context(nobody)


def test_nothing_weak(pki: Pki) -> None:
    contexts = [
        ServerCredentials(certificates=pki.server).context(nobody),
        client_context(certificates=str(pki.anonymous)),
    ]
    if credentials.HAS_PSK:
        both = ServerCredentials(certificates=pki.server, psk_file=pki.psk)
        contexts += [both.context(nobody), ServerCredentials(psk_file=pki.psk).context(nobody)]
        contexts.append(client_context(psk_file=str(pki.psk), psk_user="alice"))
    for context in contexts:
        assert context.minimum_version == TLS_1_2
        wanted = ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
        assert context.options & wanted == wanted
        ciphers = context.get_ciphers()
        assert ciphers
        for cipher in ciphers:
            assert cipher["strength_bits"] >= 128, cipher
            assert cipher["digest"] != "sha1", cipher
            assert cipher["auth"] not in ("auth-null", "auth-dss"), cipher
            assert cipher["aead"] or "psk" in cipher["kea"], cipher


def test_no_session_of_tls_1_3_is_resumed(pki: Pki) -> None:
    server = ServerCredentials(certificates=pki.server)
    client = only(client_context(certificates=str(pki.anonymous)), TLS_1_3)
    first = shake(client, server.context(nobody))
    assert not (first.client.session and first.client.session.has_ticket)
    again = shake(client, server.context(nobody), session=first.client.session)
    assert not again.server.session_reused


def test_few_sessions_of_tls_1_2_are_remembered(pki: Pki) -> None:
    """A server whose clients come and go for months holds nothing of them."""
    server = ServerCredentials(certificates=pki.server, verify_peer=True)
    client = only(client_context(certificates=str(pki.client("alice"))), TLS_1_2)
    first = shake(client, server.context(nobody))
    open_ones = [first]  # those of clients that have left without a word are forgotten
    for _ in range(2 * MAX_SESSIONS):
        context = server.context(nobody)
        open_ones.append(shake(client, context))
        assert 0 < context.session_stats()["number"] <= MAX_SESSIONS
    again = shake(client, server.context(nobody), session=first.client.session)
    assert not again.server.session_reused


def test_an_old_version_is_refused(pki: Pki) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        only(client, ssl.TLSVersion.TLSv1_1)
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        shake(client, ServerCredentials(certificates=pki.server).context(nobody))


# Pre-shared keys


@with_psk
@both_versions
@pytest.mark.parametrize("certificates", [False, True], ids=["alone", "beside-certificates"])
@pytest.mark.parametrize("user", USERS)
def test_psk(pki: Pki, version: ssl.TLSVersion, certificates: bool, user: str) -> None:
    server = ServerCredentials(psk_file=pki.psk, certificates=pki.server if certificates else None)
    users: list[str] = []
    client = only(client_context(psk_file=str(pki.psk), psk_user=user), version)
    ends = shake(client, server.context(users.append), None)
    assert users == [user]
    cipher = ends.server.cipher()
    assert cipher
    assert ends.server.session_reused if version == TLS_1_3 else "PSK" in cipher[0]
    assert ends.client.getpeercert(binary_form=True) is None
    assert server.psk_users == tuple(USERS)


@with_psk
@both_versions
def test_certificates_beside_psk(pki: Pki, version: ssl.TLSVersion) -> None:
    server = ServerCredentials(certificates=pki.server, psk_file=pki.psk, verify_peer=True)
    ends = talk(server, version, certificates=str(pki.client("alice")))
    assert ends.server.getpeercert(binary_form=True)
    assert not ends.server.session_reused
    with pytest.raises(ssl.SSLError, match="did not return a certificate"):
        talk(server, version, certificates=str(pki.anonymous))


@with_psk
@both_versions
def test_trouble_with_the_certificates_beside_psk(
    pki: Pki, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the handshake, and nothing else: no traceback."""
    server = ServerCredentials(certificates=pki.server, psk_file=pki.psk)
    client = only(client_context(certificates=str(pki.anonymous)), version)

    def none_left(name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("os.memfd_create", none_left)
    with pytest.raises(ssl.SSLError, match=r"(?i)callback"):
        shake(client, server.context(nobody))


@with_psk
@both_versions
@pytest.mark.parametrize("certificates", [False, True], ids=["alone", "beside-certificates"])
def test_psk_that_is_refused(pki: Pki, version: ssl.TLSVersion, certificates: bool) -> None:
    """A wrong key and an unknown user end in the same way."""
    server = ServerCredentials(psk_file=pki.psk, certificates=pki.server if certificates else None)
    said = []
    for user in ("alice", "stranger"):
        users: list[str] = []
        client = only(client_context(psk_file=str(pki.wrong_psk), psk_user=user), version)
        with pytest.raises(ssl.SSLError) as failed:
            shake(client, server.context(users.append), None)
        said.append(str(failed.value))
        assert users == (["alice"] if user == "alice" else [])
    assert said[0] == said[1]


@with_psk
@both_versions
def test_psk_client_takes_no_certificate_instead(pki: Pki, version: ssl.TLSVersion) -> None:
    server = ServerCredentials(certificates=pki.server)
    client = only(client_context(psk_file=str(pki.psk), psk_user="alice"), version)
    with pytest.raises(ssl.SSLError):
        shake(client, server.context(nobody), None)


@with_psk
@both_versions
def test_certificate_client_at_a_psk_server(pki: Pki, version: ssl.TLSVersion) -> None:
    server = ServerCredentials(psk_file=pki.psk)
    with pytest.raises(ssl.SSLError):
        talk(server, version, certificates=str(pki.client("alice")))


@with_psk
def test_each_connection_has_its_own_user(pki: Pki) -> None:
    server = ServerCredentials(psk_file=pki.psk)
    told: dict[str, list[str]] = {user: [] for user in USERS}
    contexts = {user: server.context(told[user].append) for user in USERS}
    for user, context in contexts.items():
        shake(client_context(psk_file=str(pki.psk), psk_user=user), context, None)
    assert told == {user: [user] for user in USERS}


@with_psk
def test_psk_user_is_the_login_name(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOGNAME", "bob")
    users: list[str] = []
    server = ServerCredentials(psk_file=pki.psk.parent)  # the directory
    shake(client_context(psk_file=str(pki.psk)), server.context(users.append), None)
    assert users == ["bob"]


@with_psk
def test_tls_type(pki: Pki) -> None:
    """The type decides, where there are both."""
    server = ServerCredentials(certificates=pki.server, psk_file=pki.psk)
    both: dict[str, Any] = {
        "certificates": str(pki.anonymous),
        "psk_file": str(pki.psk),
        "psk_user": "alice",
    }
    for kind, users in {"": ["alice"], "psk": ["alice"], "x509": []}.items():
        told: list[str] = []
        shake(client_context(tls_type=kind, **both), server.context(told.append))
        assert told == users


@with_psk
def test_unknown_psk_user_of_the_client(pki: Pki) -> None:
    with pytest.raises(TlsError) as failed:
        client_context(psk_file=str(pki.psk.parent), psk_user="carol")
    assert str(failed.value) == f"{pki.psk}: has no key of the user 'carol'"


@pytest.mark.skipif(credentials.HAS_PSK, reason="PSK works here")
def test_psk_before_python_3_13(pki: Pki) -> None:
    text = f"TLS-PSK needs Python 3.13 or later; this is {platform.python_version()}"
    with pytest.raises(UsageError) as failed:
        ServerCredentials(psk_file=pki.psk)
    assert str(failed.value) == text
    with pytest.raises(UsageError) as failed:
        client_context(psk_file=str(pki.psk))
    assert str(failed.value) == text


# Arguments, places, the environment


@pytest.mark.parametrize("verify_peer", [None, False])
def test_a_folder_of_a_client_that_is_none(pki: Pki, verify_peer: bool | None) -> None:
    """Also where the server is not verified: there may be a certificate to be shown."""
    for folder in (pki.folder / "nowhere", pki.anonymous / "ca-cert.pem"):
        with pytest.raises(TlsError, match=f"^{folder}: is no directory$"):
            client_context(certificates=str(folder), verify_peer=verify_peer)


def test_arguments_that_make_no_sense(pki: Pki) -> None:
    with pytest.raises(UsageError, match="certificates, a file of pre-shared keys, or both"):
        ServerCredentials()
    with pytest.raises(UsageError, match="verifies"):
        ServerCredentials(psk_file=pki.psk, verify_peer=True)
    with pytest.raises(UsageError, match="tls-type: 'anon': x509 or psk"):
        client_context(tls_type="anon")
    with pytest.raises(UsageError, match="tls-psk-file"):
        client_context(tls_type="psk")


@pytest.mark.parametrize("place", [".pki/libnbd", ".config/pki/libnbd"])
def test_default_directories(pki: Pki, home: Path, place: str) -> None:
    server = ServerCredentials(certificates=pki.server)
    with pytest.raises(ssl.SSLCertVerificationError):  # nothing but what the system trusts
        talk(server, TLS_1_3)
    shutil.copytree(pki.anonymous, home / place)
    talk(server, TLS_1_3)


def test_the_first_default_directory_counts(pki: Pki, home: Path) -> None:
    shutil.copytree(pki.anonymous, home / ".pki/libnbd")
    shutil.copytree(pki.distrustful, home / ".config/pki/libnbd")
    talk(ServerCredentials(certificates=pki.server), TLS_1_3)


def test_default_directories_of_root(pki: Pki, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libnbd does not look into root's home."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    shutil.copytree(pki.anonymous, home / ".pki/libnbd")
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(ServerCredentials(certificates=pki.server), TLS_1_3)


@both_versions
def test_sslkeylogfile(
    pki: Pki, version: ssl.TLSVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = {TLS_1_2: "CLIENT_RANDOM", TLS_1_3: "CLIENT_TRAFFIC_SECRET_0"}[version]
    client = client_context(certificates=str(pki.anonymous))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "of-the-server"))
    server = ServerCredentials(certificates=pki.server)
    shake(only(client, version), server.context(nobody))
    assert label in (tmp_path / "of-the-server").read_text()
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "of-the-client"))
    talk(server, version, certificates=str(pki.anonymous))
    assert label in (tmp_path / "of-the-client").read_text()


def test_sslkeylogfile_that_cannot_be_written(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "missing" / "file"))
    for make in (
        lambda: ServerCredentials(certificates=pki.server),
        lambda: client_context(certificates=str(pki.anonymous)),
    ):
        with pytest.raises(TlsError) as failed:
            make()
        assert str(failed.value) == "SSLKEYLOGFILE: cannot be written: No such file or directory"
