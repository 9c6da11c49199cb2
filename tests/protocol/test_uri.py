"""NBD URIs. The examples are those of the specification of NBD URIs, of RFC 3986 and libnbd."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.errors import UsageError
from pynbd.protocol.uri import NbdUri, Transport, is_uri

UNIX = {"transport": Transport.UNIX}
VSOCK = {"transport": Transport.VSOCK}


@pytest.mark.parametrize("uri, expected, printed", [
    # The table of "NBD URI export name", with the names it states.
    ("nbd://example.com/disk", {"host": "example.com", "export": "disk"}, None),
    ("nbd+unix:///disk?socket=sock", {**UNIX, "export": "disk", "socket": "sock"}, None),
    ("nbd://example.com/", {"host": "example.com"}, None),
    ("nbd://example.com", {"host": "example.com"}, "nbd://example.com/"),
    ("nbd://example.com//disk", {"host": "example.com", "export": "/disk"}, None),
    (
        "nbd://example.com/hello%20world",
        {"host": "example.com", "export": "hello world"},
        None,
    ),
    # The other examples of the specification.
    (
        "nbd://example.com:10809/export",
        {"host": "example.com", "export": "export"},
        "nbd://example.com/export",
    ),
    (
        "nbd+unix:///?socket=%00/abstract",
        {**UNIX, "socket": "\0/abstract"},
        None,
    ),
    # Authorities.
    ("nbd://localhost:10810/", {"host": "localhost", "port": 10810}, None),
    ("nbd://localhost:/", {"host": "localhost"}, "nbd://localhost/"),
    ("nbd://[::1]:10810/x", {"host": "::1", "port": 10810, "export": "x"}, None),
    ("nbd://[fe80::1%25eth0]/", {"host": "fe80::1%eth0"}, None),
    ("nbd:///x", {"host": "localhost", "export": "x"}, "nbd://localhost/x"),
    ("NBDS://bob%40home@127.0.0.1/", {"tls": True, "user": "bob@home", "host": "127.0.0.1"},
     "nbds://bob%40home@127.0.0.1/"),
    ("nbds+unix://alice@/?socket=s", {**UNIX, "tls": True, "user": "alice", "socket": "s"}, None),
    ("nbd+unix:/x?socket=s", {**UNIX, "export": "x", "socket": "s"}, "nbd+unix:///x?socket=s"),
    ("nbd+vsock://3:10810/x", {**VSOCK, "host": "3", "port": 10810, "export": "x"}, None),
    ("nbds+vsock:///", {**VSOCK, "tls": True, "host": "2"}, "nbds+vsock://2/"),
    # Names and parameters.
    ("nbd://h/%C3%A9%3F%23%25", {"host": "h", "export": "é?#%"}, None),
    ("nbd://h/a:b;c=d", {"host": "h", "export": "a:b;c=d"}, "nbd://h/a%3Ab%3Bc%3Dd"),
    ("nbd+unix:///?socket=a+b%26c", {**UNIX, "socket": "a+b&c"}, "nbd+unix:///?socket=a%2Bb%26c"),
    ("nbd+unix:///?socket=/tmp/%FF", {**UNIX, "socket": "/tmp/\udcff"}, None),
    ("nbds://h/?tls-type=x509&tls-hostname=a.b&tls-verify-peer=0&tls-certificates=/etc/pki",
     {"tls": True, "host": "h", "tls_type": "x509", "tls_hostname": "a.b",
      "tls_verify_peer": False, "tls_certificates": "/etc/pki"}, None),
    ("nbds://u@h/?tls-psk-file=keys.psk&tls-verify-peer=1",
     {"tls": True, "user": "u", "host": "h", "tls_psk_file": "keys.psk", "tls_verify_peer": True},
     "nbds://u@h/?tls-verify-peer=1&tls-psk-file=keys.psk"),
])  # fmt: skip
def test_parse_and_print(uri: str, expected: dict[str, Any], printed: str | None) -> None:
    parsed = NbdUri.parse(uri)
    assert parsed == NbdUri(**expected)
    assert str(parsed) == (printed or uri)
    assert NbdUri.parse(str(parsed)) == parsed


@pytest.mark.parametrize("uri, reason", [
    ("", "the scheme is one of nbd, nbds, nbd.unix, nbds.unix, nbd.vsock, nbds.vsock"),
    ("disk.qcow2", "the scheme is one of"),
    ("http://h/", "the scheme is one of"),
    ("nbd+tcp://h/", "the scheme is one of"),
    ("nbd:localhost:10809", "nbd: is followed by //"),
    ("nbd://h:x/", r"\[USER@\]HOST\[:PORT\]"),
    ("nbd://::1/", "an IPv6 address in brackets"),
    ("nbd://[::1/", "an IPv6 address in brackets"),
    ("nbd://h:0/", "the port is 1 to 65535"),
    ("nbd://h:65536/", "the port is 1 to 65535"),
    ("nbd://h:" + "9" * 5000, "PORT"),
    ("nbd://h%00/", "the host has no NUL"),
    ("nbd://%FF@h/", "the user is UTF-8"),
    ("nbd://h/a b", "' ' must be percent-encoded, %20"),
    ("nbd://h/é", "'é' must be percent-encoded, %C3%A9"),
    ("nbd://h/%zz", "'%' must be percent-encoded, %25"),
    ("nbd://h/x\n", "must be percent-encoded, %0A"),
    ("nbd://h/x#y", "a '#' is written %23"),
    ("nbd://h/%FF", "the export name is UTF-8"),
    ("nbd://h/%00", "the export name has no NUL"),
    ("nbd://h/" + "n" * 4097, "the export name has at most 4096 bytes"),
    ("nbd://h/?socket=s", "socket=PATH is needed by nbd.unix and nbds.unix, and only by them"),
    ("nbd+unix:///", "socket=PATH is needed"),
    ("nbd+unix:///?socket=", "the parameter socket is neither empty nor has a NUL"),
    ("nbd+unix:///?socket=a%00b", "the parameter socket is neither empty nor has a NUL"),
    ("nbd+unix://h/?socket=s", "no host, three slashes"),
    ("nbd+unix://:1/?socket=s", "no host, three slashes"),
    ("nbd+vsock://host/", "the host of a vsock is a context id"),
    ("nbd+vsock://2:4294967296/", "both it and its port below"),
    ("nbd+vsock://4294967296/", "both it and its port below"),
    ("nbd://h/?colour=blue", "unknown parameter colour, there are socket, tls-type"),
    ("nbd://h/?tls-certificates=/etc/pki", "tls-certificates is for nbds: nbd: is in clear"),
    ("nbd+unix:///?socket=s&tls-type=psk", r"tls-type is for nbds\+unix: nbd\+unix: is in clear"),
    ("nbds://h/?tls-type=psk&tls-type=psk", "the parameter tls-type is given twice"),
    ("nbds://h/?tls-type=ssl", "tls-type is one of anon, x509, psk"),
    ("nbds://h/?tls-verify-peer=2", "tls-verify-peer is one of 0, 1"),
    ("nbds://h/?tls-verify-peer=00", "tls-verify-peer is one of 0, 1"),
])  # fmt: skip
def test_what_is_wrong_is_named(uri: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        NbdUri.parse(uri)


@pytest.mark.parametrize("word, value", [
    ("true", True), ("TRUE", True), ("t", True), ("yes", True), ("Y", True), ("on", True),
    ("false", False), ("False", False), ("f", False), ("no", False), ("n", False), ("OFF", False),
])  # fmt: skip
def test_tls_verify_peer_is_any_word_that_libnbd_takes(word: str, value: bool) -> None:
    parsed = NbdUri.parse(f"nbds://h/?tls-verify-peer={word}")
    assert parsed.tls_verify_peer is value
    assert str(parsed) == f"nbds://h/?tls-verify-peer={int(value)}"


@pytest.mark.parametrize("name", ["a%0Ab", "a%1B%5B2J", "%E2%80%A8", "%FF"])
def test_an_unknown_parameter_is_named_as_it_was_written(name: str) -> None:
    """Decoded, it could be several lines, or speak to the terminal."""
    with pytest.raises(UsageError, match=f"unknown parameter {name}, there are") as caught:
        NbdUri.parse(f"nbd://h/?{name}=x")
    assert str(caught.value).isprintable()


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
PATH = st.binary(min_size=1, max_size=20).map(
    lambda path: path.replace(b"\0", b"0").decode("utf-8", "surrogateescape")
)
OPTIONS = {"user": TEXT, "export": TEXT}
CLEAR_OR_NOT = {"tls": st.booleans(), **OPTIONS}
URIS = st.one_of(
    st.builds(
        NbdUri,
        tls=st.just(True),
        host=st.one_of(TEXT.filter(bool).map(lambda t: t.replace("[", "")), st.just("::1")),
        port=st.integers(1, 65535),
        tls_type=st.sampled_from(["", "anon", "x509", "psk"]),
        tls_hostname=TEXT,
        tls_verify_peer=st.sampled_from([None, False, True]),
        tls_certificates=st.one_of(st.just(""), PATH),
        tls_psk_file=st.one_of(st.just(""), PATH),
        **OPTIONS,
    ),
    st.builds(NbdUri, transport=st.just(Transport.UNIX), socket=PATH, **CLEAR_OR_NOT),
    st.builds(
        NbdUri,
        transport=st.just(Transport.VSOCK),
        host=st.integers(0, 2**32 - 1).map(str),
        port=st.integers(0, 2**32 - 1),
        **CLEAR_OR_NOT,
    ),
    st.builds(NbdUri, host=st.just("h"), **CLEAR_OR_NOT),
)


@given(URIS)
def test_round_trip(uri: NbdUri) -> None:
    assert NbdUri.parse(str(uri)) == uri


@given(st.one_of(st.text(), st.text(alphabet="nbds+unix:/?#[]@&=%0localhost").map("nbd:".__add__)))
def test_garbage_is_refused_or_parsed(text: str) -> None:
    try:
        uri = NbdUri.parse(text)
    except UsageError:
        return
    assert NbdUri.parse(str(uri)) == uri


def test_what_is_meant_to_be_a_uri() -> None:
    for name in "nbd://localhost", "NBDS://x", "nbd+unix:///?socket=/s", "nbds+vsock://1":
        assert is_uri(name)
    for name in "./nbd://x", "disk.nbd", "nbd", "http://x", "json:{}", "/nbd:x":
        assert not is_uri(name)
