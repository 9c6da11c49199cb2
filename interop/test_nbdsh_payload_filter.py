"""nbdsh names the contexts it wants to hear of, request by request (NBD_CMD_FLAG_PAYLOAD_LEN).

What pynbd answers is what qemu-nbd answers for the same image and the same filters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from interop import peers, samples
from interop.conftest import serving

BASE, B0, B1 = CONTEXTS = ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
SUBSETS = [list(names) for count in (1, 2, 3) for names in combinations(CONTEXTS, count)]

# libnbd lets everything pass that it can put into a request; PAYLOAD_LEN it sets by itself.
CONNECT = f"""
import json
h.set_strict_mode(nbd.STRICT_AUTO_FLAG)
for context in {CONTEXTS!r}:
    h.add_meta_context(context)

def ask(names, offset=0, length=None, flags=0):
    "The extents of each context that was answered, or the error."
    said = {{}}
    length = h.get_size() - offset if length is None else length
    heard = lambda context, start, extents, error: said.update({{context: extents}})
    try:
        h.block_status_filter(length, offset, names, heard, flags=flags)
    except nbd.Error as error:
        return error.errno
    return said
"""

# The server's ids are rewritten on their way to libnbd, which uses the wrong ones from then on.
RELAY = """
import re, socket, threading

def connect(path, wrong):
    ours, libnbds = socket.socketpair()
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)

    def relay(source, target, edit):
        while data := source.recv(1 << 20):
            target.sendall(edit(data))

    change = lambda data: re.sub(rb"(?s)....(?=base:allocation)", wrong.to_bytes(4, "big"), data)
    for way in (ours, server, bytes), (server, ours, change):
        threading.Thread(target=relay, args=way, daemon=True).start()
    h.connect_socket(libnbds.detach())
"""

Uris = dict[str, str]


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uris]:
    """The same image by pynbd and by qemu-nbd."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdsh")
    top = samples.chain(tmp_path_factory.mktemp("chain"))
    exposed = ["-r", "-f", "qcow2", "-B", "b0", "-B", "b1"]
    with serving(top, *exposed) as pynbd, peers.qemu_nbd(top, *exposed) as qemu:
        yield {"pynbd": pynbd, "qemu-nbd": qemu}


def answer(uri: str, script: str) -> Any:
    """What a script that connects to ``uri`` leaves in ``answer``."""
    lines = [CONNECT, f"uri = {uri!r}", script, "print(json.dumps(answer))"]
    return json.loads(peers.nbdsh("\n".join(lines)))


def answers(uris: Uris, script: str) -> tuple[Any, Any]:
    """The same from pynbd, and from qemu-nbd."""
    return answer(uris["pynbd"], script), answer(uris["qemu-nbd"], script)


def test_every_subset(uris: Uris) -> None:
    """On one connection, over and over, ranges of all kinds, in any order of the names."""
    script = f"""
h.connect_uri(uri)
size = h.get_size()
ranges = [(0, size), (1, size - 1), (size - 1, 1), (1 << 20, 5 << 20), (100000, 12345)]
answer = [
    [ask(names, offset, length, flags)
        for flags in (0, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FUA)
        for offset, length in ranges]
    for subset in {SUBSETS!r} for names in (subset, subset[::-1])
]
unfiltered = {{}}
h.block_status_64(size, 0, lambda context, *rest: unfiltered.update({{context: rest[1]}}))
answer.append([unfiltered])
"""
    ours, theirs = answers(uris, script)
    assert ours == theirs
    wanted = [subset for subset in SUBSETS for _ in range(2)] + [CONTEXTS]
    for names, said in zip(wanted, ours, strict=True):
        assert all(sorted(answer) == names for answer in said)
    whole = [answer[0] for answer in ours]
    assert all(said[name] == whole[-1][name] for said in whole for name in said)
    assert all(len(extents) > 3 for extents in whole[-1].values())


REFUSED = {
    "no names": "[]",
    "the same name twice": f"['{BASE}', '{BASE}']",
    "more names than were negotiated": f"{CONTEXTS!r} + ['{B1}']",
    "no bytes": f"['{B0}'], 0, 0",
    "past the end": f"['{B0}'], 512, h.get_size()",
    "past the end, of no bytes": f"['{B0}'], h.get_size(), 0",
    "an offset past the end": f"['{B0}'], h.get_size(), 1",
    "as long as can be": f"['{B0}'], 512, 2**64 - 1",
    "DF": f"['{B0}'], flags=nbd.CMD_FLAG_DF",
    "NO_HOLE": f"['{B0}'], flags=nbd.CMD_FLAG_NO_HOLE",
    "FAST_ZERO": f"['{B0}'], flags=nbd.CMD_FLAG_FAST_ZERO",
}


def test_refusals(uris: Uris) -> None:
    """Each is EINVAL, and the connection goes on with a filter that is right."""
    asked = ", ".join(f"ask({arguments})" for arguments in REFUSED.values())
    ours, theirs = answers(uris, f"h.connect_uri(uri)\nanswer = [{asked}, ask(['{B0}'])]")
    assert dict(zip(REFUSED, ours, strict=False)) == dict.fromkeys(REFUSED, "EINVAL")
    assert list(ours[-1]) == [B0]
    assert ours == theirs


@pytest.mark.parametrize("wrong", [9, 0xFFFFFFFF])
def test_unknown_id(uris: Uris, wrong: int) -> None:
    """An id that the server never gave: EINVAL, alone and among good ones, and it goes on."""
    script = f"""{RELAY}
connect(uri.partition("?socket=")[2], {wrong})
answer = [ask(["{BASE}"]), ask({CONTEXTS!r}), ask(["{B1}"])]
"""
    ours, theirs = answers(uris, script)
    assert ours[:2] == ["EINVAL", "EINVAL"]
    assert list(ours[2]) == [B1]
    assert ours == theirs


@pytest.mark.parametrize("other", [1, 2, 3])
def test_id_that_was_not_negotiated(uris: Uris, other: int) -> None:
    """Whatever ids the server gives to its other contexts, here only base:allocation counts."""
    script = f"""{RELAY}
h.clear_meta_contexts()
h.add_meta_context("{BASE}")
connect(uri.partition("?socket=")[2], {other})
answer = [ask(["{BASE}"]), bytes(h.pread(4, 1 << 20)).hex()]
"""
    ours, theirs = answers(uris, script)
    assert ours == theirs == ["EINVAL", "12" * 4]


def test_nothing_negotiated(uris: Uris) -> None:
    """Without contexts the filter is not offered, and is refused (row P14)."""
    script = """
h.clear_meta_contexts()
h.connect_uri(uri)
answer = [h.can_block_status_payload(), ask([]), bytes(h.pread(4, 1 << 20)).hex()]
"""
    assert answer(uris["pynbd"], script) == [False, "EINVAL", "12" * 4]
