"""QEMU's ``--object``: what each becomes, and what none is made of.

Types, properties and defaults are those that ``qemu-nbd --object TYPE,help`` and
``qapi/crypto.json``, ``qapi/authz.json`` of QEMU name.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pynbd.cli.objects import PSK, X509, Objects
from pynbd.errors import PynbdError, UnsupportedFeature, UsageError

SERVER = "tls-creds-x509,id=t,endpoint=server,dir=/pki"


def refusal(*texts: str) -> PynbdError:
    with pytest.raises(PynbdError) as caught:
        Objects(texts)
    assert "\n" not in str(caught.value)
    return caught.value


def test_certificates() -> None:
    found = Objects([SERVER]).credentials_of("t", "server")
    assert (found.kind, found.directory, found.password) == (X509, "/pki", None)
    assert found.verify_peer  # for a server, too


@pytest.mark.parametrize("word", ["on", "yes", "true", "y"])
def test_flags_that_are_on(word: str) -> None:
    text = f"{SERVER},verify-peer={word},sanity-check={word}"
    assert Objects([text]).credentials_of("t", "server").verify_peer


@pytest.mark.parametrize("word", ["off", "no", "false", "n"])
def test_flags_that_are_off(word: str) -> None:
    text = f"{SERVER},verify-peer={word},sanity-check={word}"
    assert not Objects([text]).credentials_of("t", "server").verify_peer


def test_keys() -> None:
    text = "tls-creds-psk,id=t,endpoint=server,dir=/pki,verify-peer=no"
    found = Objects([text]).credentials_of("t", "server")
    assert (found.kind, found.psk_file) == (PSK, "/pki/keys.psk")


def test_a_client_has_a_user() -> None:
    for more, user in (("", "qemu"), (",username=alice", "alice"), (",endpoint=client", "qemu")):
        found = Objects([f"tls-creds-psk,id=t,dir=/pki{more}"]).credentials_of("t", "client")
        assert found.username == user


def test_a_directory_is_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon leaves the directory that it was started in."""
    monkeypatch.chdir(tmp_path)
    found = Objects(["tls-creds-psk,id=t,endpoint=server,dir=a,,b"]).credentials_of("t", "server")
    assert found.psk_file == str(tmp_path / "a,b" / "keys.psk")


@pytest.mark.parametrize("priority", ["NORMAL", "@SYSTEM"])
def test_the_usual_priorities(priority: str) -> None:
    assert Objects([f"{SERVER},priority={priority}"]).credentials_of("t", "server")


def test_json() -> None:
    properties = {"qom-type": "tls-creds-x509", "id": "t", "endpoint": "server", "dir": "/a,b"}
    text = json.dumps({**properties, "verify-peer": False})
    found = Objects([text]).credentials_of("t", "server")
    assert (found.directory, found.verify_peer) == ("/a,b", False)


def test_the_type_has_a_key() -> None:
    assert Objects(["id=t,endpoint=server,dir=/pki,qom-type=tls-creds-x509"]).credentials


def test_the_last_of_a_property_counts() -> None:
    assert Objects([f"{SERVER},dir=/other"]).credentials_of("t", "server").directory == "/other"


@pytest.mark.parametrize(
    "secret",
    [
        "data=pass,,word",
        "data=pass,,word,format=raw",
        "data=cGFzcyx3b3Jk,format=base64",
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_secret_opens_the_key(secret: str, order: int) -> None:
    texts = [f"secret,id=s,{secret}", f"{SERVER},passwordid=s"][::order]
    assert Objects(texts).credentials_of("t", "server").password == "pass,word"


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for form, content in (("raw", "pass,word"), ("base64", "cGFzcy\nx3b3Jk\n")):
        path.write_text(content)
        texts = [f"secret,id=s,file={path},format={form}", f"{SERVER},passwordid=s"]
        assert Objects(texts).credentials_of("t", "server").password == "pass,word"


def test_no_error_says_a_secret() -> None:
    for more in ("keyid=k", "iv=v", "format=base64", "format=other", "x=y", "file=f", "keyid"):
        assert "hidden" not in str(refusal(f"secret,id=s,data=hidden!,{more}"))
    texts = ["secret,id=s,data=/////w==,format=base64", f"{SERVER},passwordid=s"]
    assert "UTF-8" in str(refusal(*texts))


DN = "CN=alice,O=Example"


@pytest.mark.parametrize(
    "text, name, comes_in",
    [
        ("authz-simple,id=a,identity=CN=alice,,O=Example", DN, True),
        ("authz-simple,id=a,identity=CN=alice,,O=Example", "CN=alice", False),
        ("authz-simple,id=a,identity=", "", True),
        ("authz-list,id=a", DN, False),
        ("authz-list,id=a,policy=deny", DN, False),
        ("authz-list,id=a,policy=allow", DN, True),
        ("authz-list,id=a,rules.0.match=CN=alice*,rules.0.policy=allow", DN, False),
        (
            "authz-list,id=a,rules.0.match=CN=alice*,rules.0.policy=allow,rules.0.format=glob",
            DN,
            True,
        ),
        (
            (
                "authz-list,id=a,policy=allow,rules.1.match=*,rules.1.policy=deny,rules.1.format=glob,"
                "rules.0.match=CN=alice,,O=Example,rules.0.policy=allow,rules.0.format=exact"
            ),
            DN,
            True,
        ),
        (
            (
                '{"qom-type": "authz-list", "id": "a", "policy": "allow", "rules":'
                ' [{"match": "*O=Example", "policy": "deny", "format": "glob"}]}'
            ),
            DN,
            False,
        ),
    ],
)
def test_authorisation(text: str, name: str, comes_in: bool) -> None:
    assert Objects([text]).authorizer_of("a")(name) is comes_in


def test_ten_rules_stand_in_their_order() -> None:
    rules = ",".join(
        f"rules.{number}.match={number},rules.{number}.policy={'allow' if number == 10 else 'deny'}"
        for number in range(12)
    )
    authorize = Objects([f"authz-list,id=a,{rules}"]).authorizer_of("a")
    assert [authorize(str(number)) for number in (1, 9, 10, 11)] == [False, False, True, False]


def test_a_list_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('{"policy": "deny", "rules": [{"match": "CN=alice", "policy": "allow"}]}')
    authorize = Objects([f"authz-list-file,id=a,filename={path}"]).authorizer_of("a")
    assert authorize("CN=alice")
    assert not authorize("CN=bob")
    path.write_text('{"policy": "allow"}')
    assert authorize("CN=bob")
    path.write_text('{"policy": "maybe"}')
    assert not authorize("CN=alice")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"policy": 1}', '{"x": 1}', '{"rules": 1}'])
def test_a_file_that_has_no_list(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    said = str(refusal(f"authz-list-file,id=a,filename={path}"))
    assert said.startswith(f"--object authz-list-file,id=a: {path}: ")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ("TYPE,id=ID",)),
        ("{", ("not JSON",)),
        ("{} x", ("not JSON",)),
        ('{"id": "t"}', ("TYPE,id=ID",)),
        ('{"qom-type": 7, "id": "t"}', ("TYPE,id=ID",)),
        ("tls-creds-x509", ("tls-creds-x509", "id")),
        ("tls-creds-x509,id=1t,dir=/", ("id", "a letter")),
        ("tls-creds-x509,id=", ("id", "a letter")),
        ('{"qom-type": "secret", "id": 7}', ("id", "a letter")),
        ("tls-creds,id=t", ("tls-creds", "tls-creds-x509", "tls-creds-psk", "authz-list-file")),
        ("iothread,id=t", ("iothread", "secret")),
        ("tls-creds-x509,id=t", ("dir", "directory")),
        ("tls-creds-x509,id=t,dir=", ("dir", "directory")),
        ("tls-creds-x509,id=t,dir=/,endpoint=both", ("endpoint", "'both'", "client, server")),
        ("tls-creds-x509,id=t,dir=/,verify-peer=maybe", ("verify-peer", "on or off")),
        ("tls-creds-x509,id=t,dir=/,verify-peer", ("part 4", "KEY=VALUE")),
        ("tls-creds-x509,id=t,dir=/,sanity-check=maybe", ("sanity-check", "on or off")),
        ('{"qom-type": "tls-creds-x509", "id": "t", "dir": 7}', ("dir", "text")),
        ('{"qom-type": "tls-creds-x509", "id": "t", "dir": "/", "verify-peer": 1}', ("on or off",)),
        ("tls-creds-x509,id=t,dir=/,foo=1", ("foo", "endpoint", "passwordid", "sanity-check")),
        ("tls-creds-x509,id=t,dir=/,username=1", ("username", "passwordid")),
        ("tls-creds-psk,id=t,dir=/,passwordid=1", ("passwordid", "username")),
        ("tls-creds-psk,id=t,dir=/,endpoint=server,username=a", ("username", "endpoint=client")),
        ("tls-creds-x509,id=t,dir=/,endpoint=server,passwordid=s", ("passwordid", "'s'", "secret")),
        ("tls-creds-x509,id=t,dir=/,rules.0.match=a", ("rules", "endpoint")),
        ("tls-creds-x509,id=t,dir=/,dir.x=1", ("dir", "both")),
        ("secret,id=s", ("either data or file",)),
        ("secret,id=s,data=x,file=y", ("either data or file",)),
        ("secret,id=s,data=x,format=hex", ("format", "'hex'", "raw, base64")),
        ("secret,id=s,data=x,format=base64", ("base64",)),
        ("secret,id=s,data=x,foo=base64", ("foo", "data, file, format")),
        ("authz-simple,id=a", ("identity is missing",)),
        ("authz-simple,id=a,identity=x,y=z", ("y", "identity")),
        ("authz-list,id=a,policy=maybe", ("policy", "'maybe'", "allow, deny")),
        ("authz-list,id=a,rules=x", ("rules", "rules.0.match")),
        ("authz-list,id=a,rules.0=x", ("rules.0", "match")),
        ("authz-list,id=a,rules.1.match=x,rules.1.policy=deny", ("rules.0", "from 0 on")),
        ("authz-list,id=a,rules.x.match=x,rules.x.policy=deny", ("rules.0", "from 0 on")),
        ("authz-list,id=a,rules.0.match=x", ("rules.0", "policy", "missing", "allow, deny")),
        ("authz-list,id=a,rules.0.policy=deny", ("rules.0", "match is missing")),
        (
            "authz-list,id=a,rules.0.match=x,rules.0.policy=deny,rules.0.format=regex",
            ("format", "'regex'", "exact, glob"),
        ),
        (
            "authz-list,id=a,rules.0.match=x,rules.0.policy=deny,rules.0.foo=1",
            ("rules.0", "foo", "match, policy, format"),
        ),
        ("authz-list-file,id=a", ("filename is missing",)),
        ("authz-list-file,id=a,filename=/x,foo=1", ("foo", "filename, refresh")),
    ],
)
def test_what_is_no_object(text: str, parts: tuple[str, ...]) -> None:
    error = refusal(text)
    assert type(error) is UsageError
    assert str(error).startswith("--object")
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize(
    "text, part",
    [
        ("tls-creds-anon,id=t,endpoint=server", "without certificates or keys"),
        ("authz-pam,id=a,service=pynbd", "PAM"),
        ("secret,id=s,data=x,keyid=k,iv=v", "encrypted"),
        ("secret,id=s,data=x,iv=v", "encrypted"),
        ("tls-creds-x509,id=t,dir=/,priority=NORMAL:-VERS-TLS1.2", "NORMAL and @SYSTEM"),
        ("tls-creds-psk,id=t,dir=/,priority=SECURE256", "NORMAL and @SYSTEM"),
    ],
)
def test_what_qemu_has_and_pynbd_has_not(text: str, part: str) -> None:
    error = refusal(text)
    assert type(error) is UnsupportedFeature
    assert part in str(error)


def test_the_key_of_a_client_has_no_password() -> None:
    error = refusal("secret,id=s,data=x", "tls-creds-x509,id=t,dir=/,passwordid=s")
    assert type(error) is UnsupportedFeature


def test_an_id_is_of_one_object() -> None:
    assert "another object" in str(refusal(SERVER, "secret,id=t,data=x"))


def test_a_file_of_a_secret_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Objects(["secret,id=s,file=/nonexistent/secret"])
    assert caught.value.filename == "/nonexistent/secret"


def test_what_is_not_there() -> None:
    objects = Objects([SERVER, "authz-simple,id=a,identity=x"])
    with pytest.raises(UsageError, match="--tls-creds: no object 'u'; there is t"):
        objects.credentials_of("u", "server")
    with pytest.raises(UsageError, match="--tls-creds: no object 'a'; there is t"):
        objects.credentials_of("a", "server")
    with pytest.raises(UsageError, match="--tls-authz: no object 't'; there is a"):
        objects.authorizer_of("t")
    with pytest.raises(UsageError, match="--tls-creds: no object 't'; --object tls-creds"):
        Objects([]).credentials_of("t", "server")


def test_each_end_has_its_own() -> None:
    with pytest.raises(UsageError, match="'t' is for a server; endpoint=client is expected"):
        Objects([SERVER]).credentials_of("t", "client")
    with pytest.raises(UsageError, match="'t' is for a client; endpoint=server is expected"):
        Objects(["tls-creds-x509,id=t,dir=/pki"]).credentials_of("t", "server")  # the default
