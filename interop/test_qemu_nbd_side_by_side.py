"""qemu-nbd and pynbd-qemu-nbd with the same arguments, on copies of the same images: the same exit
status, exports, sizes, flags, contexts, maps and bytes.

`DIFFERENT` is where they are not alike on purpose, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from interop import drop_in, peers, samples
from interop.drop_in import OURS, PROGRAMS, REAL

SERVED = """
-f raw disk.raw
-r -f raw disk.raw
-f raw odd.raw
-r -f raw odd.raw
-r -f raw base.raw
-r -f raw top.qcow2
-r -f qcow2 top.qcow2
-r -f qcow2 middle.qcow2
-r -f raw file:disk.raw
-r top.qcow2
top.qcow2
-f qcow2 flat.qcow2
-A -B b0 -B b1 -f qcow2 top.qcow2
-o 0x10200 -f qcow2 flat.qcow2
-e 0 --discard=unmap --detect-zeroes=unmap --cache=none --aio=native -f qcow2 top.qcow2
--image-opts driver=qcow2,file.driver=file,file.filename=top.qcow2
-e 0 -f raw disk.raw
-e 2 -r -f raw disk.raw
-e 1 -r -f qcow2 top.qcow2
'-e 2' -f raw disk.raw
-e 0x10 -f raw disk.raw
-x disk -D 'for a test' -r -f raw disk.raw
--export-name= --description= -f raw disk.raw
-x 'ä b/c' -r -f raw disk.raw
-A -r -f qcow2 top.qcow2
-A -f raw disk.raw
-B b0 -r -f qcow2 top.qcow2
-A -B b0 -B b1 -r -f qcow2 top.qcow2
-l s1 -f qcow2 top.qcow2
-l 1 -f qcow2 top.qcow2
-A -l snapshot.name=s1 -f qcow2 top.qcow2
-l snapshot.id=1,snapshot.name=s1 -f qcow2 top.qcow2
-o 66048 -f raw disk.raw
-o 0x10200 -r -A -f qcow2 flat.qcow2
-o 01000 -r -f qcow2 flat.qcow2
-o 01000 -r -f raw disk.raw
-o 1048576 -r -f raw disk.raw
-n -f raw disk.raw
--cache=none --aio=native -r -f qcow2 top.qcow2
--cache=off --aio=native -f raw disk.raw
--cache=writethrough -f raw disk.raw
--cache=directsync --aio=native -f raw disk.raw
--cache=unsafe -f raw disk.raw
--cache writeback --aio threads -f raw disk.raw
--discard=unmap -f raw disk.raw
--discard on -f raw disk.raw
--discard=ignore -f raw disk.raw
--discard=unmap --detect-zeroes=unmap --cache=none --aio=native -r -f qcow2 top.qcow2
--detect-zeroes=on -r -f qcow2 top.qcow2
--detect-zeroes=off -f raw disk.raw
-s -r -f qcow2 top.qcow2
-s -f raw disk.raw
-s -f raw odd.raw
-s -A -B b0 -f qcow2 top.qcow2
-s --discard=unmap --detect-zeroes=unmap flat.qcow2
--image-opts -r driver=qcow2,file.driver=file,file.filename=top.qcow2
--image-opts -r driver=qcow2,backing=,file.filename=top.qcow2
--image-opts driver=raw,offset=64k,size=128k,file.driver=file,file.filename=disk.raw
-r -A 'json:{"driver": "qcow2", "file": {"filename": "top.qcow2"}, "backing": null}'
'json:{"driver": "raw", "offset": 4096, "file": {"driver": "file", "filename": "disk.raw"}}'
-r -f raw 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}'
--pers --read --form raw disk.raw
-trfraw disk.raw
disk.raw -f raw --read-only --
-r -f raw -- disk.raw
--handshake-limit=0x10 -f raw disk.raw
--trace 'nbd_*' -r -f raw disk.raw
--object secret,id=x,data=abc -f raw disk.raw
""".strip().splitlines()

REFUSED = """

-?
--bogus
-p
--p 1 disk.raw
--tls x disk.raw
--fork=1 disk.raw
-P 1 disk.raw
-k s disk.raw
-k {socket}
-k {socket} disk.raw odd.raw
-k {socket} -f raw missing.raw
-k {socket} -f raw .
-k {socket} -f raw ''
-k {socket} -f nosuch disk.raw
-k {socket} -f qcow2 disk.raw
-k {socket} -n --cache=none -f raw disk.raw
-k {socket} --cache=bogus -f raw disk.raw
-k {socket} --aio=bogus -f raw disk.raw
-k {socket} --aio=threads --aio=threads -f raw disk.raw
-k {socket} --aio=native -f raw disk.raw
-k {socket} --discard=bogus -f raw disk.raw
-k {socket} --discard=unmap --discard=unmap -f raw disk.raw
-k {socket} --detect-zeroes=bogus -f raw disk.raw
-k {socket} --detect-zeroes=unmap -f raw disk.raw
-k {socket} -o x -f raw disk.raw
-k {socket} -o 1M -f raw disk.raw
-k {socket} -o -1 -f raw disk.raw
-k {socket} -o 2000000 -f raw disk.raw
-k {socket} -e x -f raw disk.raw
-k {socket} -e -1 -f raw disk.raw
-k {socket} -e '2 ' -f raw disk.raw
-k {socket} --handshake-limit=1.5 -f raw disk.raw
-p x -b 127.0.0.1 -f raw disk.raw
-p 10809 -b nosuch.invalid -f raw disk.raw
-k {socket} -l nosuch -f qcow2 top.qcow2
-k {socket} -l snapshot.foo=1 -f qcow2 top.qcow2
-k {socket} -l snapshot.id=2,snapshot.name=s1 -f qcow2 top.qcow2
-k {socket} -l '' -f qcow2 top.qcow2
-k {socket} -l s1 -f raw disk.raw
-k {socket} -s -l s1 -f qcow2 top.qcow2
-k {socket} -s -f raw missing.raw
-k {socket} -l s1 -o 512 -f qcow2 top.qcow2
-k {socket} -r -B nosuch -f qcow2 top.qcow2
-k {socket} -B b0 -f raw disk.raw
-k {socket} -r -B '' -f qcow2 top.qcow2
-k {socket} -r -B b0 -o 512 -f qcow2 top.qcow2
-k {socket} --image-opts -f raw file.filename=disk.raw
-k {socket} --image-opts disk.raw
-k {socket} --image-opts driver=nosuch,file.filename=disk.raw
-k {socket} --image-opts driver=raw,bogus=1,file.filename=disk.raw
-k {socket} 'json:{bad'
-k {socket} --tls-creds tls0 -f raw disk.raw
-k {socket} --tls-authz a -f raw disk.raw
-k {socket} --object nosuch,id=x -f raw disk.raw
-k {socket} --selinux-label=x -f raw disk.raw
-k /nonexistent/s -f raw disk.raw
-k /tmp/{long} -f raw disk.raw
-k {socket} --pid-file=/nonexistent/pid -f raw disk.raw
-k {socket} --fork -f raw missing.raw
-L disk.raw
-L -x e -k {socket}
-L -n -k {socket}
-L --fork -k {socket}
-L -k {socket}
-c /nonexistent/nbd0 -k {socket} -f raw disk.raw
-v -c /nonexistent/nbd0 -k {socket} -f raw disk.raw
-d /nonexistent/nbd0
-d
-k {socket} --selinux-label=x
--selinux-label=x -b 127.0.0.1 -p 1 -f raw disk.raw
""".removeprefix("\n").splitlines()

# What clients see otherwise than through qemu-nbd: in which part of `seen`, and why.
SEEN_DIFFERENT = {
    "-r disk.raw": ("listing", "where qemu-nbd guesses raw, it wants whole sectors asked for"),
    "disk.raw": ("listing", "the same"),
    "-B b1 -B b1 -r -f qcow2 top.qcow2": ("listing", "qemu-nbd lists a context twice"),
    "-o 0x10200 -r -A -f qcow2 top.qcow2": (
        "maps",
        "with -o, qemu-nbd knows nothing of what lies below the top layer: hole, not zero",
    ),
    "-s -r -A -f qcow2 top.qcow2": ("maps", "nothing is written: there is no overlay"),
    "-s -o 66048 -f raw disk.raw": ("maps", "qemu-nbd says that it is a hole, but no zeroes"),
    "--cache=none -f raw odd.raw": ("maps", "with O_DIRECT, qemu-nbd looks at whole sectors"),
}

# What qemu-nbd takes and pynbd-qemu-nbd refuses, and why.
DIFFERENT = {
    "-k {socket} --image-opts driver=compress,file.driver=qcow2,file.file.filename=top.qcow2": (
        "not yet"
    ),
    "-k {socket} -B b0 -l s1 -f qcow2 top.qcow2": "the bitmap says nothing of the snapshot",
    "-p 70000 -b 127.0.0.1 -f raw disk.raw": "qemu-nbd listens on port 4464",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdsh")
    folder = tmp_path_factory.mktemp("originals")
    drop_in.images(folder)
    return folder


def copy(originals: Path, folder: Path) -> Path:
    subprocess.run(["cp", "-a", originals, folder], check=True)  # holes stay holes
    return folder


def seen(program: str, line: str, folder: Path) -> dict[str, Any]:
    """All that clients see of the program, and its exit status."""
    args = shlex.split(line)
    with drop_in.running(program, "-t", *args, folder=folder) as run:
        listing = json.loads(peers.run("nbdinfo", "--json", "--list", run.uri).stdout)
        export = listing["exports"][0]
        del export["uri"]
        run.uri = run.uri.replace("///", "///" + quote(export["export-name"], safe=""))
        maps = {}
        for context in export["contexts"]:
            said = peers.run("nbdinfo", "--json", f"--map={context}", run.uri).stdout
            maps[context] = json.loads(said)
        copied = subprocess.run(
            [*peers.command("nbdcopy"), run.uri, "-"],
            check=True,
            capture_output=True,
            timeout=30,
        )
    return {
        "listing": listing,
        "maps": maps,
        "content": hashlib.sha256(copied.stdout).hexdigest(),
        "status": run.status,
    }


@pytest.mark.parametrize("line", SERVED)
def test_served(line: str, originals: Path, tmp_path: Path) -> None:
    real, ours = (seen(program, line, copy(originals, tmp_path / program)) for program in PROGRAMS)
    assert ours == real


@pytest.mark.parametrize("line", SEEN_DIFFERENT)
def test_seen_different(line: str, originals: Path, tmp_path: Path) -> None:
    part, _reason = SEEN_DIFFERENT[line]
    real, ours = (seen(program, line, copy(originals, tmp_path / program)) for program in PROGRAMS)
    assert {key for key in real if real[key] != ours[key]} == {part}


def refusal(
    program: str, line: str, folder: Path, socket: Path
) -> subprocess.CompletedProcess[str]:
    args = shlex.split(line.replace("{socket}", str(socket)).replace("{long}", "x" * 120))
    return drop_in.refused(program, *args, folder=folder)


def one_line(done: subprocess.CompletedProcess[str]) -> bool:
    return done.stderr.startswith(f"{OURS}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str, originals: Path) -> None:
    with peers.socket_path() as socket:
        real, ours = (refusal(program, line, originals, socket) for program in PROGRAMS)
        assert not socket.exists() or not peers.connects(socket)
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)
    assert one_line(ours), ours.stderr


@pytest.mark.parametrize("line", DIFFERENT)
def test_different(line: str, originals: Path) -> None:
    with peers.socket_path() as socket:
        ours = refusal(OURS, line, originals, socket)
        assert not socket.exists()
    assert (ours.returncode, ours.stdout) == (1, "")
    assert one_line(ours), ours.stderr


FAST = "h.zero(65536, 720896, nbd.CMD_FLAG_FAST_ZERO)\n"
ZERO = "h.zero(131072, 262144 + 512)\n"
NO_HOLE = "h.zero(131072, 524288, nbd.CMD_FLAG_NO_HOLE)\n"
CHANGES = f"""
h.pwrite(b"a" * 5000, 1000)
h.pwrite(b"b" * 65536, h.get_size() - 65536, nbd.CMD_FLAG_FUA)
h.trim(131072, 131072)
{ZERO}{NO_HOLE}{FAST}h.pwrite(bytes(65536), 851968)
h.pwrite(bytes(65536) + b"c" * 512, 7 * 65536 + 32768)
h.flush()
"""


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync", "unsafe"])
@pytest.mark.parametrize(
    "discard, detect", [("ignore", "off"), ("unmap", "off"), ("unmap", "unmap")]
)
def test_written(cache: str, discard: str, detect: str, originals: Path, tmp_path: Path) -> None:
    """The same changes leave the same bytes, the same map and the same space taken."""
    written(f"--cache={cache} --discard={discard} --detect-zeroes={detect}", originals, tmp_path)


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_zeroes_that_are_detected_and_stay_allocated(
    discard: str, originals: Path, tmp_path: Path
) -> None:
    written(f"--discard={discard} --detect-zeroes=on", originals, tmp_path)


def written(options: str, originals: Path, tmp_path: Path) -> None:
    found = {}
    for program in PROGRAMS:
        folder = copy(originals, tmp_path / program)
        disk = folder / "disk.raw"
        disk.write_bytes(bytes(range(1, 129)) * 8192)
        line = [*options.split(), "-f", "raw", "-t", "disk.raw"]
        with drop_in.running(program, *line, folder=folder) as run:
            peers.nbdsh(CHANGES, run.uri)
            told = peers.run("nbdinfo", "--map", run.uri).stdout
        found[program] = (run.status, told, disk.read_bytes(), disk.stat().st_blocks)
    assert found[OURS] == found[REAL]


@pytest.mark.parametrize(
    "image, options",
    [
        ("flat", "--discard=ignore"),
        ("flat", "--discard=unmap --detect-zeroes=unmap"),
        ("flat", "--discard=unmap --offset=65536"),
        ("top", "--discard=unmap"),
        ("top", "--detect-zeroes=on --cache=none"),
        ("subclusters", "--discard=ignore --detect-zeroes=on"),
        ("subclusters", "--discard=unmap --detect-zeroes=unmap"),
        ("version2", "--discard=unmap"),
        ("version2", "--discard=unmap --detect-zeroes=on --cache=writethrough"),
    ],
)
def test_written_qcow2(image: str, options: str, originals: Path, tmp_path: Path) -> None:
    """The same changes leave the same bytes, in clusters of the same kinds, and the same bitmaps;
    and what clients are told meanwhile is the same.
    """
    found = {}
    for program in PROGRAMS:
        folder = copy(originals, tmp_path / program)
        file = written_qcow2(image, folder)
        line = [*options.split(), "-A", *(["-B", "b0"] if image == "top" else [])]
        with drop_in.running(program, *line, "-f", "qcow2", "-t", file, folder=folder) as run:
            peers.nbdsh(changes_of_qcow2(image), run.uri)
            told = [
                peers.run("nbdinfo", f"--map={context}", run.uri).stdout
                for context in ["qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
                if image == "top" or "bitmap" not in context
            ]
        peers.run("qemu-img", "check", folder / file)
        raw = folder / "content.raw"
        peers.run("qemu-img", "convert", "-O", "raw", folder / file, raw)
        found[program] = (
            run.status,
            told,
            raw.read_bytes(),
            kinds(folder / file),
            bitmaps(file, folder),
        )
    for real, ours in zip(found[REAL], found[OURS], strict=True):
        assert ours == real


def changes_of_qcow2(image: str) -> str:
    """`CHANGES`, but that NO_HOLE is for what has its space already: elsewhere qemu-nbd does not
    allocate any; and that no part of a cluster is made zero where nothing is at all: qemu-nbd makes
    a zero cluster of it, pynbd leaves it alone. Nothing is fast without zero clusters.
    """
    changes = CHANGES.replace(NO_HOLE, "h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)\n")
    changes = changes.replace(ZERO, "h.zero(49152, 196608 + 512)\nh.zero(131072, 262144)\n")
    return changes.replace(FAST, "") if image == "version2" else changes


def written_qcow2(image: str, folder: Path) -> str:
    """The name of a file that is written to."""
    file = f"{image}.qcow2"
    options = {"subclusters": ["-o", "extended_l2=on"], "version2": ["-o", "compat=0.10"]}
    if image in options:
        line = ["-q", "-f", "qcow2", *options[image], "-b", "disk.raw", "-F", "raw"]
        peers.run("qemu-img", "create", *line, file, cwd=folder)
        samples.qemu_io(folder / file, "write -q -P 30 0 300k")
    return file


def kinds(image: Path) -> list[tuple[bool, bool, bool, int]]:
    """Of each block of 2 KiB, a subcluster: whether it is in the chain, is known to read as zeroes
    and nothing else, and has a place; and at which depth.
    """
    said = json.loads(peers.run("qemu-img", "map", "--output=json", image).stdout)
    blocks = []
    for row in said:
        zero = row["zero"] and not row["data"]  # else it depends on the holes of the file
        kind = row["present"], zero, "offset" in row, row["depth"]
        blocks += [kind] * (row["length"] // 2048)
    return blocks


def bitmaps(file: str, folder: Path) -> list[str]:
    """What qemu-nbd finds of them afterwards."""
    if file != "top.qcow2":
        return []
    found = []
    for name in ["b0", "b1"]:
        with drop_in.running(REAL, "-r", "-B", name, "-f", "qcow2", file, folder=folder) as run:
            context = f"--map=qemu:dirty-bitmap:{name}"
            found.append(peers.run("nbdinfo", context, run.uri).stdout)
    return found


@pytest.mark.parametrize("line", ["-f raw disk.raw", "-A -f qcow2 top.qcow2", "flat.qcow2"])
def test_snapshot(line: str, originals: Path, tmp_path: Path) -> None:
    """What clients write they read again, and the images are as they were."""
    found = {}
    for program in PROGRAMS:
        folder = copy(originals, tmp_path / program)
        before = contents(folder)
        with drop_in.running(program, "-s", *line.split(), "-t", folder=folder) as run:
            peers.nbdsh(CHANGES.replace(NO_HOLE, ""), run.uri)
            image = subprocess.run(
                [*peers.command("nbdcopy"), run.uri, "-"],
                check=True,
                capture_output=True,
                timeout=30,
            ).stdout
            maps = [
                peers.run("nbdinfo", f"--map={context}", run.uri).stdout
                for context in ["qemu:allocation-depth"] * ("-A" in line)
            ]
        assert contents(folder) == before
        found[program] = (run.status, image, maps)
    assert found[OURS] == found[REAL]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_past_the_end_of_a_raw_file(originals: Path, tmp_path: Path) -> None:
    found = {}
    for program in PROGRAMS:
        folder = copy(originals, tmp_path / program)
        with drop_in.running(program, "-f", "raw", "odd.raw", folder=folder) as run:
            peers.nbdsh('h.pwrite(b"x" * 12, 1005)', run.uri)
        found[program] = (folder / "odd.raw").read_bytes()
    assert found[OURS] == found[REAL]
