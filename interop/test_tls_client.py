"""pynbd's commands as clients of other servers over TLS: what they print is what nbdinfo prints, or
what is in the image; and what they refuse, they refuse in one line.
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interop import peers, samples, tls_ends
from interop.certificates import Pki
from interop.tls_ends import NBDKIT, PYNBD, QEMU, Credentials

SIZE = 2 << 20


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    peers.require("qemu-nbd", "nbdkit", "nbdinfo")
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk"
    samples.sparse_file(path, SIZE)
    return path


def pynbd(*args: str | Path, status: int = 0, **environment: str) -> str:
    """What a command prints; or where it fails the line in which it says why."""
    done = subprocess.run(
        [sys.executable, "-m", "pynbd", *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == bool(status), done.stderr
    return done.stderr.strip() if status else done.stdout


@pytest.mark.parametrize("program", [QEMU, NBDKIT])
def test_commands(program: str, pki: Pki, image: Path, tmp_path: Path) -> None:
    copy, ours = tmp_path / "copy", Credentials(certificates=pki.client("alice"))
    with tls_ends.serving(program, image, Credentials(certificates=pki.server)) as server:
        uri = server.where.uri(ours, "localhost")
        told = json.loads(peers.run("nbdinfo", "--json", uri).stdout)
        said = json.loads(pynbd("info", "--json", uri))
        assert said["TLS"] is told["TLS"] is True
        assert said["exports"][0]["export-size"] == told["exports"][0]["export-size"] == SIZE
        rows = json.loads(pynbd("map", "--json", uri))
        extents = json.loads(peers.run("nbdinfo", "--json", "--map", uri).stdout)
        assert [row["length"] for row in rows] == [row["length"] for row in extents]
        pynbd("copy", uri, copy)
        assert filecmp.cmp(copy, image, shallow=False)
        pynbd("compare", uri, copy)
        pynbd("copy", copy, uri)


def test_copy_from_server_to_server(pki: Pki, image: Path, tmp_path: Path) -> None:
    """Each with certificates of its own."""
    target = tmp_path / "target"
    samples.empty_file(target, SIZE)
    one = Credentials(certificates=pki.client("alice"))
    other = Credentials(certificates=pki.distrustful)
    trusted = Credentials(certificates=pki.other_server, verify=False)
    with (
        tls_ends.serving(QEMU, image, Credentials(certificates=pki.server)) as source,
        tls_ends.serving(PYNBD, target, trusted, tcp=True) as sink,
    ):
        pynbd("copy", source.where.uri(one, "localhost"), sink.where.uri(other))
    assert filecmp.cmp(target, image, shallow=False)


@pytest.mark.parametrize("program", [QEMU, NBDKIT, PYNBD])
def test_a_server_without_tls(program: str, pki: Pki, image: Path) -> None:
    """It is never asked for anything in clear (rows T1): nbdinfo does not go on either."""
    ours = Credentials(certificates=pki.anonymous)
    with tls_ends.serving(program, image, None) as server:
        uri = server.where.uri(ours)
        assert tls_ends.ask(tls_ends.LIBNBD, server.where, ours).size is None
        said = pynbd("info", uri, status=1)
        assert said.startswith(f"pynbd: {uri}: NBD_OPT_STARTTLS: NBD_REP_ERR_POLICY"), said


@pytest.mark.parametrize("program", [QEMU, NBDKIT, PYNBD])
def test_a_server_that_requires_tls(program: str, pki: Pki, image: Path) -> None:
    theirs = Credentials(certificates=pki.server, verify=False)
    with tls_ends.serving(program, image, theirs) as server:
        uri = server.where.uri(None)
        assert tls_ends.ask(tls_ends.LIBNBD, server.where, None).size is None
        said = pynbd("info", uri, status=1)
        assert said.startswith(f"pynbd: {uri}: "), said
        assert "NBD_REP_ERR_TLS_REQD" in said
        assert said.endswith(" (nbds+unix://... begins a URI with TLS)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root has another directory")
def test_the_directory_of_a_user(pki: Pki, image: Path, tmp_path: Path) -> None:
    """``~/.pki/libnbd``, where nbdinfo looks, too."""
    for name, works in (("alice", True), ("anonymous", False)):
        home = tmp_path / name
        (home / ".pki").mkdir(parents=True)
        found = pki.client(name) if works else pki.anonymous
        (home / ".pki/libnbd").symlink_to(found)
        with tls_ends.serving(PYNBD, image, Credentials(certificates=pki.server)) as server:
            uri = server.where.uri(Credentials())
            told = tls_ends.ask(
                tls_ends.LIBNBD, server.where, Credentials(), environment={"HOME": str(home)}
            )
            assert told.size == (SIZE if works else None)
            pynbd("map", uri, status=0 if works else 1, HOME=str(home))
