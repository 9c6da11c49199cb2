"""qemu-nbd and pynbd-qemu-nbd with the same ``--object``, ``--tls-creds``, ``--tls-authz`` and
``--tls-hostname``: the same refusals, and the same clients let in; as servers, and as ``--list``.

`DIFFERENT` is what qemu-nbd takes and pynbd-qemu-nbd refuses, with the reason.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from interop import drop_in, peers
from interop.certificates import PASSWORD, Pki
from interop.drop_in import OURS, PROGRAMS
from pynbd.tls.credentials import HAS_PSK

psk_only = pytest.mark.skipif(not HAS_PSK, reason="TLS-PSK needs Python 3.13")

SERVER = "--object tls-creds-x509,id=t,endpoint=server,dir={server}"
CLIENT = "--object tls-creds-x509,id=t,endpoint=client,dir={alice}"
PSK = "--object tls-creds-psk,id=t,endpoint=server,dir={psk}"
IS = "--tls-creds t --tls-authz a --object"

REFUSED = f"""
--tls-creds t
--tls-hostname h
--tls-authz a
--object tls-creds-x509,id=t,endpoint=client,dir={{alice}} --tls-creds t
--object tls-creds-x509,id=t,dir={{server}} --tls-creds t
--object tls-creds-x509,id=t,endpoint=server --tls-creds t
--object tls-creds-x509,endpoint=server,dir={{server}} --tls-creds t
--object tls-creds-x509,id=1t,endpoint=server,dir={{server}}
--object tls-creds-x509,id=t,endpoint=both,dir={{server}}
--object tls-creds-nosuch,id=t,endpoint=server,dir={{server}}
--object tls-creds-x509,id=t,endpoint=server,dir={{psk}} --tls-creds t
--object tls-creds-x509,id=t,endpoint=server,dir={{expired}} --tls-creds t
--object tls-creds-x509,id=t,endpoint=server,dir={{encrypted}} --tls-creds t
{SERVER},foo=1
{SERVER},username=alice
{SERVER},verify-peer=maybe
{SERVER},verify-peer
{SERVER},sanity-check=maybe
{SERVER},passwordid=s --tls-creds t
{SERVER} {SERVER}
{SERVER} --tls-creds u
{SERVER} --tls-creds t --tls-hostname h
{SERVER} --tls-creds t -c /dev/nbd0
{SERVER} --object secret,id=s,data=x --tls-creds s
{PSK},username=alice --tls-creds t
--object tls-creds-psk,id=t,endpoint=server,dir={{server}} --tls-creds t
--object tls-creds-psk,id=t,endpoint=client,dir={{psk}} --tls-creds t
--object secret,id=s
--object secret,id=s,data=x,file=y
--object secret,id=s,file=/nonexistent
--object secret,id=s,data=x,format=hex
--object authz-simple,id=a
--object authz-list,id=a,policy=maybe
--object authz-list,id=a,rules=x
--object authz-list,id=a,rules.0.match=x
--object authz-list,id=a,rules.0.policy=deny
--object authz-list,id=a,rules.1.match=x,rules.1.policy=deny
--object authz-list,id=a,rules.0.match=x,rules.0.policy=deny,rules.0.format=regex
--object authz-pam,id=a,service=x
--object '{{{{"id":"t"}}}}'
--object '{{{{bad'
--object ''
""".strip().splitlines()

DIFFERENT = {
    "--object tls-creds-anon,id=t,endpoint=server --tls-creds t": "who is in between is anybody",
    f"{SERVER},priority=NORMAL:-VERS-TLS1.2 --tls-creds t": "GnuTLS's strings are not translated",
    f"{SERVER} --tls-creds t --tls-authz nosuch": "qemu-nbd lets nobody in, and tells the log",
    f"{SERVER},verify-peer=no {IS} authz-simple,id=a,identity=x": "qemu-nbd lets everybody in",
    f"{SERVER} --object secret,id=s,data=hi,format=base64": "qemu-nbd takes what it can",
}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    return tmp_path


def words(line: str, pki: Pki) -> list[str]:
    named = {
        "server": pki.server,
        "alice": pki.client(),
        "expired": pki.expired_server,
        "encrypted": pki.encrypted,
        "psk": pki.psk.parent,
    }
    return shlex.split(line.format(**named))


def ends(program: str, line: str, pki: Pki, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program on a unix socket, with a command line that it refuses."""
    with peers.socket_path() as path:
        args = [*words(line, pki), "-k", str(path), "-f", "raw", "disk.raw"]
        done = drop_in.refused(program, *args, folder=folder)
        assert not path.exists() or not peers.connects(path)
    if program == OURS:
        assert done.stderr.startswith(f"{OURS}: ")
        assert done.stderr.count("\n") == 1
    return done


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str, pki: Pki, folder: Path) -> None:
    peers.require("qemu-nbd")
    real, ours = (ends(program, line, pki, folder) for program in PROGRAMS)
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout) == (1, "")


@pytest.mark.parametrize("line", DIFFERENT)
def test_different(line: str, pki: Pki, folder: Path) -> None:
    ours = ends(OURS, line, pki, folder)
    assert (ours.returncode, ours.stdout) == (1, "")


# Who comes in: "alice" and "bob" have certificates, "nobody" has none.
COME_IN = {
    SERVER: "clear",
    f"{SERVER} --tls-creds t": "alice bob",
    f"{SERVER},sanity-check=no,priority=NORMAL --tls-creds t": "alice bob",
    f"{SERVER},verify-peer=off --tls-creds t": "alice bob nobody",
    f"{SERVER} {IS} authz-simple,id=a,identity={{dn}}": "alice",
    f"{SERVER} {IS} authz-simple,id=a,identity=CN=alice": "",
    f"{SERVER} {IS} authz-list,id=a": "",
    f"{SERVER} {IS} authz-list,id=a,policy=allow": "alice bob",
    f"{SERVER} {IS} authz-list,id=a,rules.0.match={{dn}},rules.0.policy=allow": "alice",
    f"{SERVER} {IS} authz-list,id=a,policy=allow,rules.0.match={{dn}},rules.0.policy=deny": "bob",
    f"{SERVER} {IS} authz-list,id=a,rules.0.match=*CN=?ob*,rules.0.policy=allow,"
    "rules.0.format=glob": "bob",
    f"{SERVER} {IS} authz-list,id=a,rules.0.match=*CN=[b]ob*,rules.0.policy=allow,"
    "rules.0.format=glob": "",
    f"{SERVER} {IS} authz-list,id=a,rules.0.match=*,rules.0.policy=allow": "",
    "--object secret,id=s,data={password} --tls-creds t"
    " --object tls-creds-x509,id=t,endpoint=server,dir={encrypted},passwordid=s": "alice bob",
    '--object \'{{"qom-type":"tls-creds-x509","id":"t","endpoint":"server","dir":"{server}",'
    '"verify-peer":false}}\' --tls-creds t': "alice bob nobody",
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("line, who", COME_IN.items())
def test_who_comes_in(line: str, who: str, program: str, pki: Pki, folder: Path) -> None:
    peers.require("qemu-nbd", "qemu-img")
    dn = "C=GB,,ST=Essex,,L=Colchester,,O=Example,,CN=alice"
    line = line.replace("{dn}", dn).replace("{password}", f"'{PASSWORD}'")
    args = ["-t", *words(line, pki), "-f", "raw", "disk.raw"]
    with peers.socket_path() as path:
        server = [*drop_in.command(program, folder), f"--socket={path}", *args]
        with peers.listening(server, path):
            tried = ("alice", "bob", "nobody", "clear")
            found = [one for one in tried if comes_in(one, path, pki)]
    assert " ".join(found) == who


def comes_in(who: str, path: Path, pki: Pki) -> bool:
    """Whether QEMU's client can read the size."""
    if who == "clear":
        return not peers.run("qemu-img", "info", peers.unix_uri(path), check=False).returncode
    certificates = pki.anonymous if who == "nobody" else pki.client(who)
    done = peers.run(
        "qemu-img",
        "info",
        "--object",
        f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates}",
        "--image-opts",
        f"driver=nbd,path={path},tls-creds=tls0,tls-hostname=localhost",
        check=False,
    )
    return not done.returncode


@psk_only
@pytest.mark.parametrize("user, knows", [("alice", True), ("qemu", True), ("carol", False)])
def test_keys(user: str, knows: bool, pki: Pki, folder: Path) -> None:
    """qemu-nbd as a client of ours."""
    peers.require("qemu-nbd")
    line = [*words(f"{PSK} --tls-creds t", pki), "-t", "-f", "raw", "disk.raw"]
    with peers.socket_path() as path:
        server = [*drop_in.command(OURS, folder), f"--socket={path}", *line]
        with peers.listening(server, path):
            name = "" if user == "qemu" else f",username={user}"  # the default
            for program in PROGRAMS:
                creds = f"tls-creds-psk,id=t,endpoint=client,dir={pki.psk.parent}{name}"
                done = drop_in.refused(
                    program, "-L", "-k", path, "--object", creds, "--tls-creds=t", folder=folder
                )
                assert (done.returncode == 0) is knows, done.stderr


LISTS = {
    "": False,
    f"{CLIENT} --tls-creds t": False,  # nobody said what the server is called
    f"{CLIENT} --tls-creds t --tls-hostname localhost": True,
    f"{CLIENT} --tls-creds t --tls-hostname wrong": False,
    f"{CLIENT},verify-peer=off --tls-creds t": True,
    f"{CLIENT},verify-peer=off --tls-creds t --tls-hostname wrong": True,
    f"{CLIENT} --tls-creds u": False,
    f"{CLIENT} --tls-creds t --tls-authz a": False,
    f"{SERVER} --tls-creds t --tls-hostname localhost": False,
    "--tls-hostname localhost": False,
    "--tls-authz a": False,
    "--object tls-creds-x509,id=t,dir={alice} --tls-creds t --tls-hostname localhost": True,
    "--object tls-creds-x509,id=t,dir={psk} --tls-creds t --tls-hostname localhost": False,
    "--object tls-creds-x509,id=t --tls-creds t --tls-hostname localhost": False,
}


def test_lists(pki: Pki, folder: Path) -> None:
    """Each program lists what each of them serves; what it prints is the same."""
    peers.require("qemu-nbd")
    args = [*words(f"{SERVER} --tls-creds t", pki), "-t", "-x", "d", "-f", "raw", "disk.raw"]
    for program in PROGRAMS:
        with peers.socket_path() as path:
            server = [*drop_in.command(program, folder), f"--socket={path}", *args]
            with peers.listening(server, path):
                for line, works in LISTS.items():
                    options = ["-L", "-k", str(path), *words(line, pki)]
                    real, ours = (
                        drop_in.refused(client, *options, folder=folder) for client in PROGRAMS
                    )
                    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout), line
                    assert (ours.returncode == 0) is works, (line, ours.stderr)
                    assert ours.stderr.count("\n") == (not works)


def test_lists_over_tcp(pki: Pki, folder: Path) -> None:
    """The certificate is for the address, if no name is given."""
    peers.require("qemu-nbd")
    port = drop_in.free_port()
    args = [*words(f"{SERVER} --tls-creds t", pki), "-t", "-f", "raw", "disk.raw"]
    where = ["-b", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen([*drop_in.command(OURS, folder), *where, *args]) as process:
        try:
            lines = {"": 0, "--tls-hostname localhost": 0, "--tls-hostname wrong": 1}
            client = f"{CLIENT} --tls-creds t"
            drop_in.wait_until(lambda: listed(OURS, client, where, pki, folder) == 0)
            for line, status in lines.items():
                for program in PROGRAMS:
                    assert listed(program, f"{client} {line}", where, pki, folder) == status, line
        finally:
            process.terminate()


def listed(program: str, line: str, where: list[str], pki: Pki, folder: Path) -> int:
    return drop_in.refused(program, "-L", *where, *words(line, pki), folder=folder).returncode
