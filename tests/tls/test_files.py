"""What can be wrong with the files of credentials: each is one line that names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from interop.certificates import EXPIRED, PASSWORD, USERS, Pki
from pynbd.errors import TlsError
from pynbd.tls import files
from pynbd.tls.credentials import ServerCredentials, client_context

KEY = "0123456789abcdef" * 4


def complaint(make: Callable[[], object]) -> str:
    with pytest.raises(TlsError) as failed:
        make()
    text = str(failed.value)
    assert len(text) <= 300
    assert text.isprintable()
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__ or failed.value.__context__ is None
    return text


def server(folder: Path, *, password: str | None = None) -> str:
    return complaint(
        lambda: ServerCredentials(certificates=folder, verify_peer=True, key_password=password)
    )


@pytest.fixture
def folder(pki: Pki, tmp_path: Path) -> Path:
    """A good server's, to be spoiled."""
    return shutil.copytree(pki.server_with_crl, tmp_path / "server")


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert server(folder) == f"{folder / name}: cannot be read: No such file or directory"


ALL = ["ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"]
WHAT = {
    "ca-cert.pem": "is no certificate in PEM, or a malformed one",
    "ca-crl.pem": "is no list of revoked certificates in PEM",
    "server-cert.pem": "is no certificate in PEM, or a malformed one",
    "server-key.pem": "is no private key in PEM, or of a kind that is not known",
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("content", ["", "no PEM", "\0\xff"], ids=["empty", "text", "bytes"])
def test_something_else(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, "latin-1")
    assert server(folder) == f"{folder / name}: {WHAT[name]}"


@pytest.mark.parametrize("name", ALL)
def test_cut_in_the_middle(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2] + data[-data[::-1].index(b"\n", 1) - 1 :])
    assert server(folder) == f"{folder / name}: {WHAT[name]}"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("other", ALL)
def test_one_file_in_the_place_of_another(folder: Path, name: str, other: str) -> None:
    kinds = [one.split("-")[1] for one in (name, other)]
    if kinds[0] != kinds[1]:
        shutil.copy(folder / other, folder / name)
        assert server(folder) == f"{folder / name}: {WHAT[name]}"


@pytest.mark.parametrize("name", ALL)
def test_directory(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert server(folder) == f"{folder / name}: cannot be read: Is a directory"


@pytest.mark.parametrize("name", ALL)
def test_trouble_with_the_file_system(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    text = "cannot be read: Too many levels of symbolic links"
    assert server(folder) == f"{folder / name}: {text}"


@pytest.mark.parametrize("name", ALL)
def test_link_that_leads_nowhere(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    assert server(folder) == f"{folder / name}: cannot be read: No such file or directory"


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file"
    assert server(path) == f"{path}/server-cert.pem: cannot be read: Not a directory"


def test_names_that_cannot_be_shown(tmp_path: Path) -> None:
    assert server(tmp_path / "a\nb\x1b").startswith(f"{tmp_path}/a?b?/server-cert.pem: ")
    text = server(tmp_path.joinpath(*["deep" * 20] * 10))
    assert text.startswith("...")
    assert text.endswith("deep/server-cert.pem: cannot be read: No such file or directory")
    assert server(Path("a\0b")).startswith("a?b/server-cert.pem: cannot be read: ")


def test_wrong_key(pki: Pki) -> None:
    path = pki.server_wrong_key / "server-key.pem"
    assert server(path.parent) == f"{path}: is not the key of the certificate in server-cert.pem"


def test_encrypted_key(pki: Pki) -> None:
    path = pki.encrypted / "server-key.pem"
    assert server(path.parent) == f"{path}: the key is encrypted, and no password was given"
    text = server(path.parent, password=PASSWORD + "!")
    assert text == f"{path}: the password does not open the key"


@pytest.mark.parametrize(
    "which, says",
    [("expired_server", "expired on"), ("future_server", "is not valid before")],
)
def test_certificate_out_of_date(pki: Pki, which: str, says: str) -> None:
    folder: Path = getattr(pki, which)
    text = server(folder)
    assert text.startswith(f"{folder}/server-cert.pem: the certificate {says} 20")
    assert text.endswith(" UTC")


def test_authority_out_of_date(folder: Path, pki: Pki) -> None:
    """Only if there is no other one: bundles keep old ones."""
    old = pki.ca.issue("old", "server", valid=EXPIRED).pem()
    good = (folder / "ca-cert.pem").read_bytes()
    (folder / "ca-cert.pem").write_bytes(old)
    assert server(folder).startswith(f"{folder}/ca-cert.pem: the certificate expired on 20")
    (folder / "ca-cert.pem").write_bytes(old + good)
    ServerCredentials(certificates=folder, verify_peer=True)


def test_list_of_revoked_certificates_out_of_date(folder: Path, pki: Pki) -> None:
    (folder / "ca-crl.pem").write_bytes(pki.ca.crl(valid=EXPIRED))
    assert server(folder).startswith(f"{folder}/ca-crl.pem: the list was to be renewed by 20")


def test_weak_key(pki: Pki, tmp_path: Path) -> None:
    """OpenSSL itself refuses what is below its level of security."""
    key = rsa.generate_private_key(65537, 1024)
    pki.ca.issue("localhost", "server", key=key).store(tmp_path, "server")
    text = complaint(lambda: ServerCredentials(certificates=tmp_path))
    assert text == f"{tmp_path}/server-cert.pem: OpenSSL does not take it: ee key too small"


@pytest.mark.parametrize("missing", ["client-cert.pem", "client-key.pem"])
def test_half_a_client(pki: Pki, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(pki.client("alice"), tmp_path / "client")
    (folder / missing).unlink()
    text = complaint(lambda: client_context(certificates=str(folder)))
    assert text == f"{folder / missing}: cannot be read: No such file or directory"


def test_client_without_authority(pki: Pki, tmp_path: Path) -> None:
    text = complaint(lambda: client_context(certificates=str(tmp_path)))
    assert text == f"{tmp_path}/ca-cert.pem: cannot be read: No such file or directory"
    client_context(certificates=str(tmp_path), verify_peer=False)


# keys.psk


def keys(path: Path, text: str) -> dict[str, bytes]:
    (path / "keys.psk").write_text(text)
    return files.pre_shared_keys(path)


def test_users(pki: Pki) -> None:
    expected = {user: bytes.fromhex(key) for user, key in USERS.items()}
    assert files.pre_shared_keys(pki.psk) == expected
    assert files.pre_shared_keys(pki.psk.parent) == expected


def test_kinds_of_lines(tmp_path: Path) -> None:
    text = f"alice:{KEY}\r\n\n# a comment\n#no:hex\nBøb X:{KEY.upper()} \n#c3a93a:{KEY}"
    assert list(keys(tmp_path, text)) == ["alice", "Bøb X", "é:"]
    assert set(keys(tmp_path, text).values()) == {bytes.fromhex(KEY)}


@pytest.mark.parametrize(
    "line, says",
    [
        ("alice", "is not user:key, with the key in hexadecimal"),
        ("alice:", "is not user:key, with the key in hexadecimal"),
        (f":{KEY}", "is not user:key, with the key in hexadecimal"),
        (f"alice:{KEY}0", "is not user:key, with the key in hexadecimal"),
        (f"alice:{KEY[:-1]}g", "is not user:key, with the key in hexadecimal"),
        (f"alice:{KEY}:{KEY}", "is not user:key, with the key in hexadecimal"),
        (f"alice: {KEY}", "is not user:key, with the key in hexadecimal"),
        ("alice:" + "ab" * 15, "the key has 15 bytes; 16 to 512 are allowed"),
        ("alice:" + "ab" * 513, "the key has 513 bytes; 16 to 512 are allowed"),
        (f"bob:{KEY}", "there is a key of this user before"),
        (f"#626f62:{KEY}", "there is a key of this user before"),
        (f"#ff:{KEY}", "the name of the user is not in UTF-8"),
        (f"{'x' * 129}:{KEY}", "the name of the user has more than 128 bytes, or a zero"),
        (f"#00:{KEY}", "the name of the user has more than 128 bytes, or a zero"),
    ],
)
def test_bad_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "keys.psk"
    text = complaint(lambda: keys(tmp_path, f"bob:{KEY}\n\n{line}\n"))
    assert text == f"{path}: line 3: {says}"
    assert KEY[:16] not in text


def test_no_line(tmp_path: Path) -> None:
    text = complaint(lambda: keys(tmp_path, "# nobody\n"))
    assert text == f"{tmp_path}/keys.psk: has no line user:key, with the key in hexadecimal"


def test_not_a_text(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_bytes(b"\xff:" + KEY.encode())
    text = complaint(lambda: files.pre_shared_keys(tmp_path / "keys.psk"))
    assert text == f"{tmp_path}/keys.psk: line 1: is not in UTF-8"


def test_a_key_at_either_limit(tmp_path: Path) -> None:
    text = f"a:{'ab' * files.MIN_PSK}\n{'b' * files.MAX_PSK_USER}:{'cd' * files.MAX_PSK}\n"
    assert [len(key) for key in keys(tmp_path, text).values()] == [files.MIN_PSK, files.MAX_PSK]


def test_dates_are_compared_in_utc(pki: Pki, tmp_path: Path) -> None:
    """A certificate of the last minute is good in every time zone."""
    minute = timedelta(minutes=1)
    issued = pki.ca.issue("localhost", "server", valid=(-minute, 5 * minute))
    shutil.copy(pki.server / "ca-cert.pem", tmp_path)
    issued.store(tmp_path, "server")
    ServerCredentials(certificates=tmp_path)
