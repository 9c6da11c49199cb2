"""Generated chains through pynbd: the bytes of qemu-img, and the maps of qemu-nbd, exactly."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from interop import generator, peers
from interop.conftest import PynbdServe
from interop.generator import SNAPSHOT, Chain, ChainPlan

# What each server says in structured replies, every context negotiated; neighbours are merged.
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
    yield from (list(runs(h, context)) for context in {contexts!r})
    h.shutdown()

def runs(h, wanted):
    size, offset, start, last = h.get_size(), 0, 0, None
    while offset < size:
        said = {{}}
        h.block_status(size - offset, offset, lambda c, o, entries, e: said.update({{c: entries}}))
        assert len(said) == {count}
        for length, flags in zip(said[wanted][::2], said[wanted][1::2]):
            if flags != last:
                yield offset - start, last
                start, last = offset, flags
            offset += length
    yield offset - start, last

def extended(uri):
    h = nbd.NBD()
    h.connect_uri(uri)
    return h.get_extended_headers_negotiated()

assert all(map(extended, {uris!r}))  # so nbdinfo had these
print(json.dumps([list(maps(uri)) for uri in {uris!r}]))
"""


def convert(chain: Chain, raw: Path, *args: str) -> None:
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *args, chain.top, raw)


def nbdinfo_map(uri: str, context: str) -> object:
    return json.loads(peers.run("nbdinfo", "--json", f"--map={context}", uri).stdout)


@pytest.mark.parametrize("plan", generator.plan(), ids=lambda plan: plan.id)
def test_chain(
    plan: ChainPlan,
    tmp_path: Path,
    built_chain: Callable[[ChainPlan], Chain],
    pynbd_serve: PynbdServe,
) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdsh")
    chain = built_chain(plan)
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
def test_snapshot(
    plan: ChainPlan,
    tmp_path: Path,
    built_chain: Callable[[ChainPlan], Chain],
    pynbd_serve: PynbdServe,
) -> None:
    peers.require("qemu-img", "qemu-io", "nbdcopy")
    chain = built_chain(plan)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    convert(chain, expected, "-l", f"snapshot.name={SNAPSHOT}")
    peers.run("nbdcopy", pynbd_serve(chain.top, "-f", "qcow2", "-l", SNAPSHOT), actual)
    assert filecmp.cmp(expected, actual, shallow=False)
