"""Generated chains through pynbd: the bytes of qemu-img, and the maps of qemu-nbd, exactly."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest

from interop import generator, peers
from interop.conftest import PynbdServe
from interop.generator import SNAPSHOT, Chain, ChainPlan

# Each server's answer in structured replies, of all contexts at once, with neighbours merged.
STRUCTURED_MAPS = """
import json
import nbd

def maps(uri):
    h = nbd.NBD()
    h.set_request_extended_headers(False)
    for context in {contexts!r}:
        h.add_meta_context(context)
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() and not h.get_extended_headers_negotiated()
    runs = {{}}
    def extent(context, offset, entries, error):
        found = runs.setdefault(context, [])
        for length, flags in zip(entries[::2], entries[1::2]):
            if found and found[-1][1] == flags:
                found[-1][0] += length
            else:
                found.append([length, flags])
    size, offset = h.get_size(), 0
    while offset < size:
        h.block_status(size - offset, offset, extent)
        ends = [sum(length for length, _ in found) for found in runs.values()]
        assert len(ends) == {count}
        offset = min(ends)
        for found in runs.values():
            trim = sum(length for length, _ in found) - offset
            while trim:
                last = found[-1]
                cut = min(trim, last[0])
                last[0] -= cut
                trim -= cut
                if not last[0]:
                    found.pop()
    h.shutdown()
    return runs

print(json.dumps([maps(uri) for uri in {uris!r}]))
"""


def convert(chain: Chain, raw: Path, *args: str) -> None:
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *args, chain.top, raw)


def nbdinfo_map(uri: str, context: str) -> object:
    return json.loads(peers.run("nbdinfo", "--json", f"--map={context}", uri).stdout)


@pytest.mark.parametrize("plan", generator.plan(), ids=lambda plan: plan.id)
def test_chain(plan: ChainPlan, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdsh")
    chain = generator.build(plan, tmp_path)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    uri = pynbd_serve(chain.top, "-r", "-f", "qcow2")

    convert(chain, expected)
    peers.run("nbdcopy", uri, actual)
    assert filecmp.cmp(expected, actual, shallow=False)

    dirty = [f"qemu:dirty-bitmap:{name}" for name in chain.bitmaps]
    contexts = ["base:allocation", "qemu:allocation-depth", *dirty]
    exposed = ["-A", *(f"--bitmap={name}" for name in chain.bitmaps)]
    with peers.qemu_nbd(chain.top, "-r", "-f", "qcow2", *exposed) as qemu:
        for context in contexts:
            assert nbdinfo_map(uri, context) == nbdinfo_map(qemu, context), context
        uris = [uri, qemu]
        script = STRUCTURED_MAPS.format(contexts=contexts, count=len(contexts), uris=uris)
        ours, theirs = json.loads(peers.nbdsh(script))
        assert ours == theirs


SNAPSHOTS = [plan for plan in generator.plan() if plan.layers[-1].snapshot]


@pytest.mark.parametrize("plan", SNAPSHOTS[::3], ids=lambda plan: plan.id)
def test_snapshot(plan: ChainPlan, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io", "nbdcopy")
    chain = generator.build(plan, tmp_path)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    convert(chain, expected, "-l", f"snapshot.name={SNAPSHOT}")
    peers.run("nbdcopy", pynbd_serve(chain.top, "-f", "qcow2", "-l", SNAPSHOT), actual)
    assert filecmp.cmp(expected, actual, shallow=False)
